"""Where upcycle keeps what it can make or fetch again."""

import os
from pathlib import Path

from upcycle.errors import UsageError


def cache_directory() -> Path:
    """``$UPCYCLE_CACHE``, or ``upcycle`` in the user's cache directory; it need not exist.

    Raises:
        UsageError: this user has no home directory, as in some containers.
    """
    if chosen := os.environ.get("UPCYCLE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "upcycle"
    except RuntimeError as error:
        raise UsageError(f"{error}; set UPCYCLE_CACHE to a folder to keep files in") from error
