"""Free memory between the pieces of a streamed conversion."""

import platform
import subprocess
import sys

import pytest

# Blocks of 64 KiB come from the heap; those that stay keep all free ones below the heap's end.
FRAGMENTED = """
import sys
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

from upcycle.util.memory import give_back
give_back()
blocks = [b"x" * 2**16 for _ in range(1024)]
del blocks[::2], blocks[::2]
before = anonymous()
give_back()
print(len(blocks), before - anonymous())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked for its memory")
def test_free_memory_between_blocks_is_given_back() -> None:
    command = [sys.executable, "-c", FRAGMENTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept == 256
    assert returned > 0.9 * 768 * 64  # KiB; a hole keeps the parts of pages at its ends
