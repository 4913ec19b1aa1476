"""A file tells one thing: no Python file of the product is longer than 300 lines."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("upcycle", "passes", "targets", "recipes")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_has_at_most_300_lines(path: Path) -> None:
    lines = len((ROOT / path).read_text("utf-8").splitlines())
    assert lines <= 300, f"{path} has {lines} lines: split it by what it tells"
