import math
from pathlib import Path

import pytest

from upcycle.errors import UsageError
from upcycle.util.json_text import json_text, read_json


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json_text({"a": [1.5, math.inf, math.nan], "b": "\u00e9"}), encoding="utf-8")
    assert read_json(path) == {"a": [1.5, None, None], "b": "\u00e9"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{\n oops", "not JSON: .*line 2 column 2"),
        (b"", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.json: {words}.*; copy or download it again$"):
        read_json(path)
    with pytest.raises(UsageError, match=rf"{words}.*; convert the model again$"):
        read_json(path, "convert the model again")
