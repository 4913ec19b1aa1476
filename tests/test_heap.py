"""How much memory is free, and what is given back between the pieces of a conversion."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from upcycle.util import memory
from upcycle.util.memory import free_memory

GB = 10**9

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


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The files of a container's limit; the page cache holds all but 1 of the machine's 16 GB."""
    machine = SimpleNamespace(total=16 * GB, free=GB, available=12 * GB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def limit(cgroup: Path, most: str, used: int, cached: int = 0) -> None:
    (cgroup / "memory.max").write_text(f"{most}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(
        f"anon {used - cached}\nfile {cached}\ninactive_file {cached // 2}\n"
        f"active_file {cached - cached // 2}\n"
    )


def test_the_page_cache_counts_as_free(cgroup: Path) -> None:
    assert free_memory() == 12 * GB


def test_the_limit_of_a_container_counts_if_it_is_lower(cgroup: Path) -> None:
    limit(cgroup, most=str(8 * GB), used=3 * GB)
    assert free_memory() == 5 * GB
    limit(cgroup, most=str(8 * GB), used=3 * GB, cached=2 * GB)
    assert free_memory() == 7 * GB
    limit(cgroup, most=str(8 * GB), used=9 * GB)  # it was lowered
    assert free_memory() == 0


@pytest.mark.parametrize("most", ["max", str(64 * GB)])
def test_a_limit_that_the_machine_does_not_have_is_none(cgroup: Path, most: str) -> None:
    limit(cgroup, most=most, used=3 * GB)
    assert free_memory() == 12 * GB
