"""Write a directory beside its place and move it there when it is whole."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import UsageError


@contextmanager
def staged(out: Path, *, overwrite: bool = False, protect: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields an empty directory ``<out>.tmp-<pid>`` that becomes `out` when the block ends well.

    If the block raises, Ctrl-C included, the temporary directory is removed and an old `out` is as
    it was; it is removed only after the new one is in its place. Directories above `out` are made.

    Args:
        out: the final directory.
        overwrite: replace `out` if it exists.
        protect: files and directories that are being read, and so may not be replaced.

    Raises:
        UsageError: `out` exists and `overwrite` is False, or it must not be replaced.
    """
    out = out.absolute()
    _check(out, overwrite, protect)
    new = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        publish(new, out, overwrite=overwrite, protect=protect)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def publish(new: Path, out: Path, *, overwrite: bool, protect: Sequence[Path] = ()) -> None:
    """Move the whole directory `new` to `out`, under the rules of `staged`."""
    out = out.absolute()
    _check(out, overwrite, protect)
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check(out: Path, overwrite: bool, protect: Sequence[Path]) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out}: is not a directory; choose another output")
    if not overwrite:
        raise UsageError(f"{out}: exists already; choose another output or pass `overwrite=True`")
    for path in (Path.cwd(), *protect):
        if path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out}: contains {path}, which is in use; choose another output")
