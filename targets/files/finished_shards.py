"""Which files of an interrupted run are complete, so that the next run goes on from there."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError
from upcycle.util.json_text import read_json

MANIFEST, NEW = "manifest.json", "new"  # in ``<out>.partial``


class Manifest:
    """A `ShardLog` in a file beside the directory of the shards: the hash of each, the key of the
    run, and which directory it is that they are in.

    It is rewritten after each shard by a rename, so that it is never half a file.
    """

    def __init__(self, directory: Path, key: Callable[[], str]) -> None:
        """Take the finished files of an earlier run; others are removed from `directory`.

        Args:
            directory: of the shards.
            key: says what is written; called when the first file is finished, or was.

        Raises:
            UsageError: the files are those of a run with another key.
        """
        self._directory, self._path, self._new_key = directory, directory.parent / MANIFEST, key
        self._finished: dict[str, str] = {}
        if has_finished(directory.parent):
            data = _read(self._path)
            if data["key"] != self._key:
                raise UsageError(
                    f"{directory.parent}: it is left from another conversion (another model, "
                    "recipe or version); start anew with `fresh=True`"
                )
            self._finished = data["files"]
        for path in directory.iterdir():
            if path.name not in self._finished or not _is_plain(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @cached_property
    def _key(self) -> str:
        return self._new_key()

    def is_whole(self, path: Path) -> bool:
        """Whether the file was finished, and has the bytes that it had then."""
        return _is_plain(path) and self._finished.get(path.name) == sha256(path)

    def finished(self, path: Path, digest: str) -> None:
        """Note that the file is whole; `digest` is its SHA-256."""
        self._finished[path.name] = digest
        data = {
            "key": self._key,
            "directory": self._directory.stat().st_ino,
            "files": self._finished,
        }
        beside = self._path.with_suffix(".json.tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self._path)


def has_finished(partial: Path) -> bool:
    """Whether a run left finished files in ``<partial>/new``, which was not published yet."""
    try:
        data, new = _read(partial / MANIFEST), partial / NEW
    except (OSError, UsageError):
        return False
    return bool(data["files"]) and new.is_dir() and new.stat().st_ino == data["directory"]


def sha256(path: Path) -> str:
    """Of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    files = data.get("files")
    if not isinstance(files, dict) or not {"key", "directory"} <= set(data):
        raise UsageError(f"{path}: not what upcycle writes; start anew with `fresh=True`")
    return data


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
