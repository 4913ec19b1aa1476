"""The same bytes past the cache and through it."""

import errno
import random
from pathlib import Path

import pytest

from upcycle.targets.files import output_file
from upcycle.targets.files.output_file import BUFFER, OutputFile

SIZES = [0, 1, 4096, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 4097]


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_file_holds_what_was_written(size: int, past_cache: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old" * BUFFER)
    with OutputFile(path, past_cache=past_cache) as file:
        file.write(content(size))
    assert path.read_bytes() == content(size)


@pytest.mark.parametrize("past_cache", [True, False])
def test_pieces_of_any_size_follow_each_other(past_cache: bool, tmp_path: Path) -> None:
    pieces = [content(size) for size in (7, BUFFER - 3, 4096, 2 * BUFFER, 0, 1)]
    with OutputFile(tmp_path / "file", past_cache=past_cache) as file:
        for piece in pieces:
            file.write(memoryview(piece))
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_slow_disk_gets_the_rest_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_file, "SAMPLE", BUFFER)
    monkeypatch.setattr(output_file, "FAST", 10**18)
    with OutputFile(tmp_path / "file", past_cache=True) as file:
        file.write(content(3 * BUFFER + 5))
    assert (tmp_path / "file").read_bytes() == content(3 * BUFFER + 5)


def test_the_error_of_the_system_comes_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputFile(tmp_path / "none" / "file", past_cache=True)
    with (
        pytest.raises(OSError, match="No space") as caught,
        OutputFile(Path("/dev/full"), past_cache=True) as file,
    ):
        file.write(content(2 * BUFFER))
    assert caught.value.errno == errno.ENOSPC
