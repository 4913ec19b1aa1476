"""Where upcycle keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$UPCYCLE_CACHE``, or ``upcycle`` in the user's cache directory; it need not exist."""
    if chosen := os.environ.get("UPCYCLE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "upcycle"
