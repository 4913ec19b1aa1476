"""Write a directory beside its place and move it there when it is whole.

``<out>.partial`` is ours while a run lasts: a lock, the new directory, and what an interrupted run
has finished. `out` itself is at any time as it was or as it shall be: never half, never away.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from upcycle.errors import UsageError
from upcycle.targets.files.finished_shards import MANIFEST, NEW, has_finished

LOCK, OLD = "upcycle.lock", "old"
_OURS = {LOCK, NEW, OLD, MANIFEST, f"{MANIFEST}.tmp"}
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2; macOS's renamex_np has the second
_HERE = -100  # AT_FDCWD


@contextmanager
def staged(
    out: Path,
    *,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
    resumable: bool = False,
    resume: bool = False,
    fresh: bool = False,
) -> Iterator[Path]:
    """Yields the directory ``<out>.partial/new``, which becomes `out` when the block ends well.

    If the block raises, Ctrl-C included, `out` is as it was, and ``<out>.partial`` goes, unless the
    run is `resumable` and has finished a file. Directories above `out` are made.

    Args:
        out: the final directory.
        overwrite: replace `out` if it exists.
        protect: files and directories that are being read, and so may not be replaced.
        resumable: whether a later run can use what this one has finished.
        resume: go on with what an interrupted run left; else the directory is empty.
        fresh: remove what an interrupted run left.

    Raises:
        UsageError: `out` exists and `overwrite` is False, it must not be replaced, another run
            writes it, or an interrupted run left files and neither `resume` nor `fresh` says what
            to do with them.
    """
    out = out.absolute()
    check_output(out, overwrite=overwrite, protect=protect)
    partial = partial_of(out)
    with _locked(partial):
        _finish_publishing(partial, out)
        if not (resume or fresh) and has_finished(partial):
            raise UsageError(
                f"{partial}: an interrupted run left finished files; go on with it "
                "(`resume=True`), or start anew with `fresh=True`"
            )
        if not resume:
            _empty(partial)
        new = partial / NEW
        new.mkdir(exist_ok=True)
        try:
            yield new
            publish(new, out, overwrite=overwrite, protect=protect)
        except BaseException:
            if not (resumable and has_finished(partial)):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """The directory beside `out` where it is made."""
    return out.absolute().with_name(f"{out.name}.partial")


def check_output(out: Path, *, overwrite: bool, protect: Sequence[Path] = ()) -> None:
    """Raise UsageError where `out` cannot be written, under the rules of `staged`."""
    out = out.absolute()
    if not str(out).isprintable():
        raise UsageError(f"{out}: the name has characters that no file should have; choose another")
    if not os.path.lexists(out):
        above = next(path for path in out.parents if path.exists())
        if shutil.disk_usage(above).total == 0:  # of /proc and the like, which hold no files
            raise UsageError(f"{out}: {above} is no place for files; choose another `out`")
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out}: it is not a directory; choose another `out`")
    if out.is_mount():
        raise UsageError(
            f"{out}: a mounted volume cannot be replaced; choose a directory in it as `out`"
        )
    if not overwrite:
        raise UsageError(f"{out}: it exists already; choose another `out` or pass `overwrite=True`")
    for path in (Path.cwd(), *protect):
        if path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out}: it contains {path}, which is in use; choose another `out`")


def publish(new: Path, out: Path, *, overwrite: bool, protect: Sequence[Path] = ()) -> None:
    """Move the whole directory `new` to `out`, under the rules of `staged`.

    Its bytes are on the disk before. An old `out` changes places with it at once where the file
    system can do that; elsewhere it goes beside `new` first, and the next run would put it back.
    """
    check_output(out, overwrite=overwrite, protect=protect)
    for path in [*new.rglob("*"), new]:
        _to_disk(path)
    if not out.exists():
        _move(new, out)
    elif not _rename(new, out, _EXCHANGE):
        old = new.with_name(OLD)
        out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            old.rename(out)
            raise
    _to_disk(out.parent)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make `partial`, or take that of a run that has ended, for this process alone."""
    if partial.is_symlink() or (os.path.lexists(partial) and not partial.is_dir()):
        raise UsageError(f"{partial}: upcycle writes there; move this away or choose another `out`")
    partial.mkdir(parents=True, exist_ok=True)
    strange = sorted({path.name for path in partial.iterdir()} - _OURS)
    links = sorted(path.name for path in partial.iterdir() if path.is_symlink())
    if strange or links:
        raise UsageError(
            f"{partial}: upcycle writes there, and it has {(strange + links)[0]}, which is not of "
            "upcycle; move it away or choose another `out`"
        )
    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"{partial}: another run is writing it now; wait for it or choose another `out`"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _finish_publishing(partial: Path, out: Path) -> None:
    """Put back what a killed run had moved away, and forget what it had replaced."""
    old = partial / OLD
    if old.is_dir():
        if not os.path.lexists(out):
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _move(new: Path, out: Path) -> None:
    if _rename(new, out, _NO_REPLACE):
        return
    if os.path.lexists(out):  # it appeared just now
        check_output(out, overwrite=False)
    new.rename(out)


def _rename(old: Path, new: Path, flag: int) -> bool:
    """Rename under a condition that POSIX lacks; false where the system cannot, or does not."""
    names = os.fsencode(old), os.fsencode(new)
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(_HERE, names[0], _HERE, names[1], flag) == 0)
    if hasattr(libc, "renamex_np") and flag == _EXCHANGE:
        return bool(libc.renamex_np(*names, flag) == 0)
    return False


def _to_disk(path: Path) -> None:
    """Wait until the bytes, or the names, are on the disk."""
    if path.is_symlink():
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(file)
