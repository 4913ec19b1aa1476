"""A file that a command will write at its end."""

from pathlib import Path

from upcycle.errors import UsageError


def check_new_file(out: Path, *, overwrite: bool) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        UsageError: the file exists, or its directory does not.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: it exists; give another --out, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise UsageError(
            f"{out}: there is no directory {out.parent}; make it, or give another --out"
        )
