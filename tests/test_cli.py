"""The command line: its flags, its cheap commands, and what it says when something is wrong."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from upcycle import errors
from upcycle.cli import console
from upcycle.cli import group as program
from upcycle.cli.main import main
from upcycle.models.samples import SAMPLES
from upcycle.recipe import shipped
from upcycle.version import __version__

LOG = {"-v", "--verbose", "-q", "--quiet"}
FLAGS = {
    "": LOG | {"--version"},
    "convert": LOG
    | {"MODEL", "--recipe", "--set", "--out", "--target", "--calibration", "--inputs", "--device"}
    | {"--text-field", "--runtime", "--architecture", "--onnx-profile"}
    | {"--dtype", "--seed", "--max-shard-size", "--overwrite", "--verify", "--no-verify"}
    | {"--stream", "--no-stream", "--resume", "--fresh", "--jobs", "--executor", "--json"}
    | {"--trust-remote-code", "--allow-pickle", "--pt2-form", "--print-after", "--stop-after"},
    "plan": LOG
    | {"MODEL", "--recipe", "--set", "--inputs", "--json", "--trust-remote-code"}
    | {"--runtime", "--architecture"},
    "inspect": LOG | {"MODEL", "--trace", "--inputs", "--json", "--trust-remote-code"},
    "trace": LOG
    | {"DIRECTORY", "--data", "--text", "--text-field", "--tokens", "--length", "--out"}
    | {"--overwrite", "--json", "--trust-remote-code", "--allow-pickle"},
    "generate": LOG
    | {"DIRECTORY", "--prompt", "--max-new-tokens", "--temperature", "--seed", "--k"}
    | {
        "--suppress",
        "--force",
        "--steer",
        "--contrast",
        "--adapter",
        "--json",
        "--trust-remote-code",
    },
    "steer": LOG
    | {"DIRECTORY", "--toward", "--others", "--text-field", "--top", "--action", "--about"}
    | {"--out", "--overwrite", "--json", "--trust-remote-code"},
    "place": LOG
    | {"DIRECTORY", "--trace", "--devices", "--nodes", "--seed", "--out", "--overwrite"}
    | {"--json", "--trust-remote-code"},
    "prune": LOG
    | {"DIRECTORY", "--keep", "--below", "--by", "--data", "--text", "--text-field", "--out"}
    | {"--overwrite", "--json", "--trust-remote-code", "--allow-pickle"},
    "merge": LOG
    | {"DIRECTORY", "--by", "--data", "--text", "--text-field", "--out", "--overwrite"}
    | {"--json", "--trust-remote-code", "--allow-pickle"},
    "extend": LOG
    | {"DIRECTORY", "--data", "--text", "--text-field", "--layers", "--like", "--nulls"}
    | {"--out", "--overwrite", "--json", "--trust-remote-code", "--allow-pickle"},
    "esft": LOG
    | {"DIRECTORY", "--data", "--text", "--text-field", "--p", "--by", "--like", "--out"}
    | {"--overwrite", "--json", "--trust-remote-code", "--allow-pickle"},
    "quantise": LOG
    | {"DIRECTORY", "--bits", "--alpha", "--min-group", "--out", "--overwrite", "--json"}
    | {"--trust-remote-code"},
    "graph": LOG
    | {"MODEL", "--around", "--out", "--overwrite", "--inputs", "--json", "--trust-remote-code"},
    "passes": LOG | {"--json"},
    "diff": LOG | {"A", "B", "--json", "--allow-pickle"},
    "verify": LOG
    | {"DENSE", "CONVERTED", "--source", "--data", "--text", "--text-field", "--inputs", "--json"}
    | {"--trust-remote-code", "--allow-pickle"},
    "bench": LOG
    | {
        "CONVERTED",
        "--against",
        "--engine",
        "--tokens",
        "--layers",
        "--threads",
        "--seconds",
        "--training",
    }
    | {"--plot", "--inputs", "--json", "--trust-remote-code"},
    "export": LOG
    | {"DIRECTORY", "--out", "--target", "--set", "--dense", "--runtime", "--architecture"}
    | {"--gguf-type", "--pt2-form"}
    | {"--inputs", "--overwrite", "--verify", "--no-verify", "--json", "--trust-remote-code"},
    "init": LOG
    | {"MODEL", "--goal", "--runtime", "--memory", "--source", "--out", "--choose", "--overwrite"}
    | {"--inputs", "--json", "--trust-remote-code"},
    "report": LOG | {"DIRECTORY", "--out", "--open", "--json", "--trust-remote-code"},
    "env": LOG | {"--json"},
    "recipes": LOG | {"[NAME]", "--goal", "--json"},
    "schema": LOG | {"--report"},
    "samples": LOG | {"--json"},
    "samples add": LOG | {"NAME"},
}


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {prefix: group}
    for name, command in group.commands.items():
        path = f"{prefix} {name}".strip()
        if isinstance(command, click.Group):
            found |= commands(command, path)
        else:
            found[path] = command
    return found


def test_the_flags_are_the_agreed_ones() -> None:
    """A new flag is a decision: make it here too, and in the change log."""
    context = click.Context(main)
    found = {}
    for path, command in commands(main).items():
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        options -= {o for a in arguments for o in a.opts}
        found[path] = options | {a.make_metavar(context) for a in arguments}
    assert found == FLAGS


@pytest.mark.parametrize("path", FLAGS)
def test_every_command_has_help(path: str) -> None:
    result = run(*path.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("argument", ["--help", "--version", "samples"])
def test_what_needs_no_model_does_not_import_torch(argument: str) -> None:
    code = (
        "import sys; from upcycle.cli.main import main\n"
        f"try: main(['{argument}'])\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert run("--version").stdout == f"upcycle {__version__}\n"


def test_recipes_are_listed_with_their_papers() -> None:
    result = run("recipes")
    assert result.exit_code == 0
    for name in shipped.recipe_names():
        about = shipped.describe(name)
        assert f"{name}\n  {about.title}\n" in result.stdout
        assert about.url in result.stdout


def test_a_recipe_is_printed_as_it_is_stored() -> None:
    assert run("recipes", "granular").stdout == shipped.recipe_text("granular")


def test_the_schema_is_json() -> None:
    schema = json.loads(run("schema").stdout)
    assert schema["title"] == "Recipe"
    report = json.loads(run("schema", "--report").stdout)
    assert report["title"] == "Report"
    assert {"model", "checks", "layers", "end_to_end"} <= set(report["properties"])


def test_samples_are_listed() -> None:
    result = run("samples")
    assert result.exit_code == 0
    assert all(f"sample:{name} " in result.stdout for name in SAMPLES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("conver", "No such command 'conver'. Did you mean 'convert'? (see `upcycle --help`)"),
        ("convert", "Missing argument 'MODEL' (see `upcycle convert --help`)"),
        ("convert m", "--recipe is missing; `upcycle recipes` lists them"),
        ("convert m --recipe granular", "Missing option '--out' (see `upcycle convert --help`)"),
        ("plan m --recipee x", "No such option '--recipee'. Did you mean"),
        ("convert m --recipe granular --out o --target tf", "Invalid value for '--target': 'tf'"),
        ("convert m --recipe granular --out o --seed -1", "Invalid value for '--seed': -1 is not"),
        (
            "convert m --recipe granular --out o --dtype int8",
            "--dtype int8: unknown; choose one of",
        ),
        ("convert m --recipe granular --out o --max-shard-size 0", "Invalid value for '--max-sh"),
        ("verify nowhere moe", "nowhere: there is no such directory"),
        ("recipes granulr", "granulr: unknown recipe, did you mean granular? the shipped ones are"),
        ("samples add nothing", "nothing: "),
    ],
)
def test_a_usage_error_is_one_sentence(arguments: str, sentence: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_recipe_errors_come_before_the_model_is_opened(command: str) -> None:
    out = ["--out", "o"] if command == "convert" else []
    result = run(
        command, "none", "--recipe", "granular", "--set", "seed=x", "--set", "sede=1", *out
    )
    assert result.exit_code == 2
    problems = [line.split(":")[1].strip() for line in result.stderr.splitlines()]
    assert problems == ["--set seed=x", "--set sede=1"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ``upcycle recipes`` raise whatever it is given."""

    def install(error: BaseException) -> None:
        def fail() -> list[str]:
            raise error

        monkeypatch.setattr(shipped, "recipe_names", fail)

    return install


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.UsageError("the path is wrong"), 2, "the path is wrong"),
        (errors.VerificationError("too far"), 3, "too far"),
        (errors.PlanError("7 does not divide 32", site="a.mlp"), 2, "a.mlp: 7 does not divide 32"),
        (errors.ResourceError("no memory"), 5, "no memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), 5, "out/a: No space left on"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: Permission denied;"),
        (MemoryError(), 5, "there is not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't"),
            5,
            "there is not enough memory",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("x / 0"), 1, "this is a bug in upcycle (ZeroDivisionError: x / 0);"),
        (AssertionError(), 1, "this is a bug in upcycle (AssertionError);"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_is_a_sentence_and_a_code(
    failing: Any, error: BaseException, code: int, words: str
) -> None:
    failing(error)
    result = run("recipes")
    assert result.exit_code == code
    assert f"error: {words}" in result.stderr
    assert "Traceback" not in result.stderr


def test_verbose_shows_where_a_bug_is(failing: Any) -> None:
    failing(ZeroDivisionError("x / 0"))
    for arguments in (["-v", "recipes"], ["recipes", "-v"]):
        assert "Traceback" in run(*arguments).stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5k", 1500), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    context = click.Context(main)
    assert program.size_in_bytes(context, click.Option(["--x"]), text) == size


def test_quiet_prints_errors_only(tmp_path: Path) -> None:
    made = ("--recipe", "split-all", "--target", "safetensors", "--no-verify")
    done = run("convert", "sample:bert-tiny", *made, "--out", str(tmp_path / "a"), "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    done = run("convert", "sample:bert-tiny", *made, "--out", str(tmp_path / "b"), "-q", "--json")
    assert json.loads(done.stdout)["report"]["recipe"] == "split-all"  # it was asked for
    assert run("plan", "sample:bert-tiny", "--recipe", "split-all", "-q").stdout == ""
    assert run("plan", "sample:none", "--recipe", "split-all", "-q").stderr.startswith("error: ")


def test_a_long_stage_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "ALIVE", 0.01)
    console.start_log(logging.INFO)
    with console.progress() as progress:
        progress("loading", 0, 1)
        progress("converting", 1, 4)
        _wait_for(capsys, "converting: 1 of 4, running for", "loading: 0 of 1, running for")
        progress("loading", 1, 1)
        progress("converting", 4, 4)
    said = capsys.readouterr().err
    assert "loading: 1 of 1, " in said
    assert "left" not in said.splitlines()[-1]
    time.sleep(0.05)
    assert capsys.readouterr().err == ""  # nothing goes on afterwards


def _wait_for(capsys: pytest.CaptureFixture[str], *texts: str) -> None:
    said, end = "", time.monotonic() + 30
    while not all(text in said for text in texts):
        assert time.monotonic() < end, said
        time.sleep(0.01)
        said += capsys.readouterr().err
    assert re.search(r"converting: 1 of 4, running for 0 s, about 0 s left", said)


def test_the_environment_is_that_of_this_process() -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["upcycle"] == __version__
    assert found["torch"] == version("torch")
    assert str(os.cpu_count()) in found["processor"]
    assert "transformers" in run("env").stdout


def test_output_that_nobody_reads_is_no_bug() -> None:
    command = [Path(sys.executable).with_name("upcycle"), "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate()
    assert (process.returncode, said) == (program.UNREAD, b"")
