"""What the library says about arguments of Python is said about flags on the command line."""

import ast
import logging
import re
from pathlib import Path

import pytest
from rich.table import Table

from upcycle.cli.console import print_result, start_log
from upcycle.cli.flags import FLAGS, SAME, with_flags
from upcycle.cli.main import main

ROOT = Path(__file__).parents[1]
CLI = ROOT / "upcycle" / "cli"


@pytest.mark.parametrize(
    ("python", "terminal"),
    [
        ("`calibration`: a text needs a tokenizer", "--calibration: a text needs a tokenizer"),
        ("`targets=onnx`: no", "--target onnx: no"),
        ("pass `stream=False` or `overwrite=True`", "pass --no-stream or --overwrite"),
        ("give `example_inputs`", "give --inputs module:callable"),
        ("`overrides=experts.count=4`: no", "--set experts.count=4: no"),
        ("set `calibration.length` in `layers`", "set `calibration.length` in `layers`"),
    ],
)
def test_arguments_become_flags(python: str, terminal: str) -> None:
    assert with_flags(python) == terminal


def test_each_flag_is_one_of_a_command() -> None:
    flags = {flag for command in main.commands.values() for p in command.params for flag in p.opts}
    assert {with_flags(f"`{name}`").split()[0] for name in (*FLAGS, *SAME)} <= flags


def spoken(path: Path) -> list[str]:
    """The strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in nodes if id(node) not in docs and isinstance(node.value, str)]


def test_the_library_itself_names_no_flag() -> None:
    """pip, vLLM and SGLang have flags of their own; speed.py reads what a command prints."""
    files = [
        path for top in ("upcycle", "passes", "targets") for path in (ROOT / top).rglob("*.py")
    ]
    of_others = {"sample_store.py", "vllm.py", "sglang.py", "speed.py"}
    library = [p for p in files if not p.is_relative_to(CLI) and p.name not in of_others]
    said = {str(p): [s for s in spoken(p) if re.search("--[a-z]", s)] for p in library}
    assert {path: strings for path, strings in said.items() if strings} == {}
    assert any(re.search("--[a-z]", s) for p in CLI.rglob("*.py") for s in spoken(p))


def test_tables_have_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("why")
    table.add_row("ask for it with `architecture=mixtral`")
    start_log(logging.INFO)
    print_result(table, "give `calibration`")
    printed = capsys.readouterr().out
    assert "--architecture mixtral " in printed
    assert "give --calibration\n" in printed
    assert "`" not in printed
