"""Directories that are made of other files once, and kept in the cache of upcycle."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from upcycle.models.sample_store import made
from upcycle.util.cache_folder import cache_directory


def kept(name: str, files: Iterable[Path], make: Callable[[Path], None]) -> Path:
    """The directory that `make` wrote for these files, which it is called for where there is none.

    A file counts as another one when its place, size or time of change is another.

    Args:
        name: for a person who looks into the cache.
        files: what it is made of.
        make: fills an empty directory.
    """
    facts = [
        (str(real), stat.st_size, stat.st_mtime_ns)
        for real in sorted(file.resolve() for file in files)
        if (stat := real.stat())
    ]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    final = cache_directory() / "models" / f"{name}-{digest}"
    if not final.is_dir():
        with made(final) as directory:
            make(directory)
    return final
