"""How much memory is free, and how to return freed memory to the system.

Once a tensor of up to 32 MB is freed, glibc takes later ones of that size from its heap, and keeps
what lies free between them: 15 MB for each layer of 35 million weights, over all layers.
"""

import contextlib
import ctypes
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # in a container, the limits of the container


def free_memory() -> int:
    """Bytes that may still be allocated: in the machine, or in the container if that is less.

    Pages of the file cache count as free, because the kernel drops them when memory is asked for.
    """
    free: int = psutil.virtual_memory().available  # of the machine, also inside a container
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # the limit is "max", or there is none
        return free
    return min(free, max(0, limit - used + cached))


def give_back() -> None:
    """Return every free page of the heap; nothing happens where the C library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
