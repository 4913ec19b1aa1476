"""The file of the compiled kernels: made once for each kind of machine, checked before it is used.

`CXX`, or the first of ``c++``, ``g++`` and ``clang++``, compiles ``cpp/experts.cpp`` for this
machine in about two seconds; the library is kept in the user's cache directory. What is loaded runs
in this process, so nobody else may be able to write it, and its name has the hash of its bytes.
"""

import hashlib
import logging
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upcycle.util.cache_folder import cache_directory

SOURCE = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 120.0  # that a compiler may take
_log = logging.getLogger(__name__)


@contextmanager
def library_file() -> Iterator[Path]:
    """The library in the cache, compiled unless it is there; or where others can write to the
    cache, one that is gone after the block.

    Raises:
        OSError: no compiler, or it refuses the source, or the folder cannot be written.
        subprocess.TimeoutExpired: the compiler does not come to an end.
        UsageError: there is no cache directory.
    """
    names = filter(None, (os.environ.get("CXX"), *COMPILERS))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found; install g++ 12 or clang++, or set CXX")
    # What `native` means here: a home directory may be shared by machines.
    macros = _run(compiler, *FLAGS[:3], "-dM", "-E", "-x", "c++", os.devnull)
    sources = [file.read_bytes() for file in sorted(SOURCE.iterdir())]
    parts = (macros, " ".join(FLAGS).encode(), *sources)
    stem = "experts-" + _hash(b"\0".join(parts))
    folder = cache_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder):
        _log.warning(
            "%s: others can write there, so the experts are compiled anew in each process; take "
            "that right from them, or set UPCYCLE_CACHE to a folder of your own",
            folder,
        )
        with tempfile.TemporaryDirectory() as own:
            yield _compiled(compiler, stem, Path(own))
        return
    for path in folder.glob(f"{stem}-*.so"):
        if is_intact(path):
            yield path
            return
        path.unlink(missing_ok=True)
    yield _compiled(compiler, stem, folder)


def is_private(folder: Path) -> bool:
    """Whether nobody but this user and root can put a file into the folder, or in its place."""
    resolved = folder.resolve()
    return all(_is_mine(place.stat()) for place in (resolved, *resolved.parents))


def is_intact(path: Path) -> bool:
    """Whether it is a file of this user or root that no other can write, with the bytes that its
    name tells."""
    found = path.lstat()
    if not (stat.S_ISREG(found.st_mode) and _is_mine(found)):
        return False
    return path.stem.rpartition("-")[2] == _hash(path.read_bytes())


def _is_mine(found: os.stat_result) -> bool:
    if not hasattr(os, "getuid"):
        return True
    if found.st_uid not in (0, os.getuid()):
        return False
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return True  # what is mine there stays mine
    by_group = found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid)
    return not (by_group or found.st_mode & stat.S_IWOTH)


def _is_own_group(gid: int) -> bool:
    """Whether it is the group that many systems make for each user."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _compiled(compiler: str, stem: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as own:  # others may compile it, too
        made = Path(own) / f"{stem}.so"
        _run(compiler, *FLAGS, str(SOURCE / "experts.cpp"), "-o", str(made))
        made.chmod(0o700)
        return made.replace(folder / f"{stem}-{_hash(made.read_bytes())}.so")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(*command: str) -> bytes:
    """What the command writes; it and what it has started end after `SECONDS`."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as running:
        try:
            out, err = running.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    if running.returncode:
        said = " ".join(err.decode(errors="replace").split())
        raise OSError(f"{command[0]} ended with {running.returncode}: {said:.300}")
    return out
