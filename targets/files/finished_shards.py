"""Which files of an interrupted run are complete, so that the next run goes on from there."""

import json
from pathlib import Path

from upcycle.errors import UsageError

FILE = "upcycle-manifest.json"


class Manifest:
    """A `ShardLog` in a file beside the shards: the size and time of each, and the key of the run.

    It is rewritten after each shard by a rename, so that it is never half a file. What changes a
    shard later changes its time, so shards need not be read.
    """

    def __init__(self, directory: Path, key: str) -> None:
        """`key` says what is written.

        Raises:
            UsageError: the directory has a manifest with another key.
        """
        self._path = directory / FILE
        self._key = key
        self._whole: dict[str, list[int]] = {}
        if self._path.is_file():
            try:
                data = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError:
                data = {}
            if data.get("key") != key:
                raise UsageError(
                    f"{directory}: it is left from another conversion (another model, recipe or "
                    "version); remove it, or run without `resume=True`"
                )
            self._whole = data["files"]

    def is_whole(self, path: Path) -> bool:
        """Whether the file was finished and was not written to since then."""
        return path.is_file() and self._whole.get(path.name) == _stamp(path)

    def finished(self, path: Path) -> None:
        """Note that the file is whole."""
        self._whole[path.name] = _stamp(path)
        text = json.dumps({"key": self._key, "files": self._whole}, indent=2) + "\n"
        beside = self._path.with_suffix(".tmp")
        beside.write_text(text, encoding="utf-8")
        beside.rename(self._path)

    def remove(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
