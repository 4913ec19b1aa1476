"""Whatever is wrong: one sentence, the right exit code, no traceback, and no file left behind."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from upcycle.cli.main import main

CHANGES = Callable[[Path], object]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A llama directory that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "dense"))


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def convert(model: object, out: Path, *options: object, recipe: str = "sparse-upcycling") -> Result:
    return run(
        *("convert", model, "--recipe", recipe, "--out", out, "--target", "safetensors"), *options
    )


def assert_refused(result: Result, out: Path, code: int, *words: str, lines: int = 1) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == code, result.stderr
    assert len(errors) == lines, result.stderr
    for word in words:
        assert word in " ".join(errors)
    assert "Traceback" not in result.output
    assert "a bug in upcycle" not in result.output
    assert result.stdout == ""
    assert not out.exists()
    assert list(out.parent.glob(f"{out.name}.*")) == [], "something is left beside it"


def edit_config(**changes: Any) -> CHANGES:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> CHANGES:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return edit


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def write(name: str, text: str) -> CHANGES:
    return lambda directory: (directory / name).write_text(text)


def remove(name: str) -> CHANGES:
    return lambda directory: (directory / name).unlink()


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[CHANGES, int, tuple[str, ...]]] = {
    "no weights": (remove("model.safetensors"), 2, ("neither model.safetensors nor",)),
    "no config": (remove("config.json"), 2, ("it has no config.json",)),
    "config no json": (write("config.json", "{\n oops"), 2, ("config.json: not JSON", "line 2")),
    "config no object": (write("config.json", "[]"), 2, ("config.json",)),
    "unknown type": (edit_config(model_type="qwertz"), 2, ("config.json", "qwertz")),
    "unknown class": (edit_config(architectures=["MyLM"]), 4, ("MyLM", "--trust-remote-code")),
    "impossible config": (edit_config(hidden_act="qwertz"), 2, ("no model can be built",)),
    "truncated": (truncate, 2, ("model.safetensors", "not a whole safetensors file")),
    "not safetensors": (write("model.safetensors", "hello"), 2, ("not a whole safetensors",)),
    "other shape": (edit_config(intermediate_size=48), 2, ("is [", "in the file and [")),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), 2, (f"the files lack {NORM};",)),
    "pickle": (to_pickle, 2, ("pytorch_model.bin", "pickle", "--allow-pickle")),
    "quantised": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        4,
        ("quantised (gptq)", "dequantise"),
    ),
    "already sparse": (edit_config(num_local_experts=8), 4, ("already", "num_local_experts = 8")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(name: str, copied: Path, tmp_path: Path) -> None:
    change, code, words = BROKEN[name]
    change(copied)
    assert_refused(convert(copied, tmp_path / "out"), tmp_path / "out", code, *words)


def test_a_native_moe_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "moe"
    dense = small_models.saved("llama", tmp_path / "dense")
    assert convert(dense, out, "--no-verify").exit_code == 0
    refused = convert(out, tmp_path / "again")
    assert_refused(refused, tmp_path / "again", 4, "already a mixture of experts")


def test_a_converted_model_with_its_own_code(tmp_path: Path) -> None:
    dense = small_models.saved("bert", tmp_path / "dense")
    assert convert(dense, tmp_path / "moe", "--no-verify").exit_code == 0
    refused = convert(tmp_path / "moe", tmp_path / "again")
    assert_refused(refused, tmp_path / "again", 4, "made by upcycle")


def test_pickles_are_read_when_allowed(copied: Path, tmp_path: Path) -> None:
    to_pickle(copied)
    done = convert(copied, tmp_path / "out", "--allow-pickle", "--no-verify")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "nowhere: there is no such directory"),
        ("sample:bert-tyni", "did you mean bert-tiny"),
        ("small_models:nothing", "small_models:nothing: calling it failed: AttributeError"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("small_models:tokenizer", "not an nn.Module"),
        ("small_models:weightless", "the model has no weights, it is on the meta device"),
        (":f", "write it as package.module:callable"),
    ],
)
def test_no_such_model(model: str, words: str, tmp_path: Path) -> None:
    assert_refused(convert(model, tmp_path / "out"), tmp_path / "out", 2, words)


@pytest.mark.parametrize(
    ("inputs", "code", "words"),
    [
        ("small_models:nothing", 2, "calling it failed"),
        ("plain_inputs", 2, "write it as package.module:callable"),
        ("small_models:plain", 2, "not a dict or a tuple of tensors"),
        ("small_models:wrong_inputs", 4, "the forward fails on example inputs"),
    ],
)
def test_bad_inputs(inputs: str, code: int, words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(convert("small_models:plain", out, "--inputs", inputs), out, code, words)


def test_a_model_without_ffn_lists_the_near_misses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = convert("small_models:without_ffn", out)
    assert_refused(refused, out, 4, "no dense FFN", "`softmax` mixes the hidden axis", lines=2)


@pytest.mark.parametrize(
    ("recipe", "changes", "code", "words"),
    [
        (
            "granular",
            ["experts.granularity=5", "router.top_k=5"],
            2,
            "64 neurons cannot be cut into 5 equal slices",
        ),
        ("sparse-upcycling", ["router.top_k=9"], 2, "a token cannot visit 9 of 8 experts"),
        ("moefication", ["experts.count=65"], 2, "65 experts cannot share 64 neurons"),
        ("sparse-upcycling", ["layers.include=nothing.*"], 2, "leave none of the 2 FFNs"),
        ("sparse-upcycling", ["experts.cuont=8"], 2, "experts.cuont"),
        ("sparse-upcycling", ["experts.count=many"], 2, "experts.count"),
        ("sparse-upcycling", ["nothing"], 2, "nothing"),
        ("no-such-recipe", [], 2, "no-such-recipe"),
    ],
)
def test_a_recipe_that_does_not_fit(
    recipe: str, changes: list[str], code: int, words: str, llama: Path, tmp_path: Path
) -> None:
    sets = [argument for change in changes for argument in ("--set", change)]
    out = tmp_path / "out"
    assert_refused(convert(llama, out, *sets, recipe=recipe), out, code, words)


def test_every_mistake_of_a_recipe_file_has_its_place(llama: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text(
        "version: 1\nexperts:\n  method: copy\n  cuont: 8\nrouter:\n  method: normal\n"
        "  top_k: two\n  weights: renormalised\n"
    )
    refused = convert(llama, out, recipe=str(file))
    assert refused.exit_code == 2
    for place in (f"{file}:4:3", f"{file}:7:10", "count"):
        assert place in refused.stderr
    assert not out.exists()


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_the_output_exists(kind: str, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    refused = convert(llama, out)
    assert refused.exit_code == 2
    there = {"directory": "it exists already; choose another --out or pass --overwrite"}
    assert there.get(kind, "it is not a directory; choose another --out") in refused.stderr
    if kind != "directory":
        refused = convert(llama, out, "--overwrite")
        assert refused.exit_code == 2
        assert "it is not a directory" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_dense_model_is_not_overwritten(copied: Path) -> None:
    before = sorted(copied.iterdir())
    for out in (copied, copied.parent):
        refused = convert(copied, out, "--overwrite")
        assert refused.exit_code == 2
        assert f"it contains {copied}, which is in use" in refused.stderr
    assert sorted(copied.iterdir()) == before


def test_a_failed_run_leaves_the_old_output(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    truncate(copied)
    assert convert(copied, out, "--overwrite").exit_code == 2
    assert (out / "mine").read_text() == "kept"


def test_the_disk_is_too_small(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000, total=2000))
    loaded: list[int] = []
    monkeypatch.setattr("upcycle.models.dense.Source.load", lambda self: loaded.append(1))
    out = tmp_path / "out"
    assert_refused(convert(llama, out), out, 5, "will be written", "are free")
    assert loaded == [], "the weights were read first"


def test_the_output_cannot_be_written(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    refused = convert(llama, out, "--no-verify")
    assert refused.exit_code == 2
    assert f"{tmp_path / 'file'}" in refused.stderr
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "gguf"], "'gguf' is not one of"),
        (["--dtype", "int8"], "--dtype int8: unknown; choose one of float64, float32"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--calibration", "no-such-file"], "there is no such text file"),
    ],
)
def test_unknown_options(options: list[str], words: str, llama: Path, tmp_path: Path) -> None:
    assert_refused(convert(llama, tmp_path / "out", *options), tmp_path / "out", 2, words)


def test_calibration_without_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("a word after another " * 50)
    refused = convert(llama, out, "--calibration", text)
    assert_refused(refused, out, 2, "a text needs a tokenizer", str(llama))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "0 characters"), (b"\xff\xfe\x00", "not a text file in UTF-8")]
)
def test_a_bad_calibration_text(content: bytes, words: str, tmp_path: Path) -> None:
    dense = small_models.saved("llama", tmp_path / "dense", with_tokenizer=True)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(content)
    assert_refused(convert(dense, out, "--calibration", text), out, 2, words)


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_models.llama(vocab_size=20).save_pretrained(tmp_path / "dense")
    small_models.tokenizer().save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    assert_refused(convert(tmp_path / "dense", out), out, 2, "tokenizer of another model")


def test_onnx_without_onnxruntime(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else find(n, *a)
    )
    out = tmp_path / "out"
    refused = convert(llama, out, "--target", "onnx")
    assert_refused(refused, out, 2, "pip install onnxruntime", "--no-verify")
    assert convert(llama, out, "--target", "onnx", "--no-verify").exit_code == 0
    assert (out / "model.onnx").is_file()


def test_onnx_in_float64(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = convert(llama, out, "--target", "onnx", "--dtype", "float64", "--no-verify")
    assert_refused(refused, out, 4, "--target onnx", "--dtype float32")


def test_a_broken_promise_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = convert(llama, out, "--set", "verify.max_relative_error=0.001", recipe="moefication")
    assert_refused(refused, out, 3, "verification failed: end to end: error", "furthest off")


def test_an_interrupted_write_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("upcycle.targets.files.tensor_file._write_tensor", interrupt)
    out = tmp_path / "out"
    assert_refused(convert(llama, out, "--no-verify"), out, 130, "interrupted")


def test_ctrl_c_in_the_middle_of_writing(llama: Path, tmp_path: Path) -> None:
    """As a user does it: a signal to the process while it writes."""
    code = (
        "import signal, sys, time, upcycle.targets.files.tensor_file as t\n"
        # a shell that starts the tests in the background has it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "write = t._write_tensor\n"
        "t._write_tensor = lambda *a: (write(*a), print('writing', flush=True), time.sleep(30))\n"
        "from upcycle.cli.main import main; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    arguments = ["convert", llama, "--recipe", "sparse-upcycling", "--out", out, "--no-verify"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            assert (tmp_path / "out.partial" / "new").is_dir()
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_the_other_commands_say_it_too(command: str, copied: Path) -> None:
    edit_config(quantization_config={"quant_method": "awq"})(copied)
    recipe = ["--recipe", "granular"] if command == "plan" else []
    refused = run(command, copied, *recipe)
    assert refused.exit_code == 4
    assert "quantised (awq)" in refused.stderr


def test_verify_wants_an_output_of_upcycle(llama: Path) -> None:
    refused = run("verify", llama, llama)
    assert refused.exit_code == 2
    assert "no report.json" in refused.stderr
