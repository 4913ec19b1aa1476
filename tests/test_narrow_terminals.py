"""Tables on a narrow terminal: what names a row stays in one piece."""

import logging
import sys

import pytest

from upcycle.cli.console import print_result, start_log
from upcycle.cli.tables import add_rows, new_table

PATH = "layers.{0,2..28}.mlp"


def printed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    table = new_table("FFN", "activation", "becomes", "because")
    add_rows(table, [(name, "gelu", "64 experts of 24, a token visits 32", "word " * 12)])
    start_log(logging.INFO)
    print_result(table)
    return capsys.readouterr().out.splitlines()


def test_paths_and_headings_are_not_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(PATH, monkeypatch, capsys)
    assert PATH in lines[1]
    assert "activation" in lines[0]
    assert len(lines) > 3, "the other columns are"
    assert max(map(len, lines[1:])) <= 60
    assert " ".join(lines).count("word") == 12


def test_nothing_of_a_long_path_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "model.vision_tower.encoder.layers.{0,2..28}.feed_forward.mlp"
    lines = printed(path, monkeypatch, capsys)
    first = "".join(line.split(" ")[0] for line in lines[1:])
    assert path in first
