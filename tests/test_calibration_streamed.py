"""Calibration of a model in pieces, and of an ONNX file: the same as in memory, or refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_files
import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from onnx import load as load_onnx
from onnx import numpy_helper
from onnx import save as save_onnx
from safetensors.torch import load_file

from upcycle.cli.main import main
from upcycle.conversion.make import making
from upcycle.conversion.open import open_dense
from upcycle.conversion.options import Options
from upcycle.conversion.pipeline import SCRATCH
from upcycle.data.calibration import calibration_data
from upcycle.data.calibration_files import CalibrationInput
from upcycle.data.onnx_calibration import inputs_of_ffn, onnx_calibration
from upcycle.errors import UsageError
from upcycle.ir.layer_weights import empty_layer, weights_of
from upcycle.models.dense import Source
from upcycle.models.named import open_model
from upcycle.models.onnx_file import OnnxSource
from upcycle.recipe.reader import load_recipe
from upcycle.targets.provenance_file import read_origins
from upcycle.util.progress import silent

RIDGE = ["router.method=ridge", "verify.max_relative_error=9", "experts.count=4", "router.top_k=2"]
SHORT = ["calibration.tokens=512", "calibration.length=16"]
SHARDS = ["--max-shard-size", "50kB"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    small_models.build("llama").to(torch.bfloat16).save_pretrained(directory)
    small_models.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("bert", tmp_path_factory.mktemp("bert"), with_tokenizer=True)


def arguments(model: Path, out: Path, *options: str, sets: list[str] | None = None) -> list[str]:
    keys = [*RIDGE, *SHORT, *(sets or [])]
    overrides = [part for key in keys for part in ("--set", key)]
    start = ["convert", str(model), "--recipe", "factorllm", "--out", str(out)]
    return [*start, "--target", "safetensors", *SHARDS, *overrides, *options]


def convert(model: Path, out: Path, *options: str, sets: list[str] | None = None) -> Result:
    result = CliRunner().invoke(main, arguments(model, out, *options, sets=sets))
    assert result.exit_code == 0, result.output
    return result


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return data


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["calibration.sequential=false"],
        ["experts.shared=1", "router.weights=gain", "compensate.mean=true"],
    ],
    ids=["sequential", "parallel", "shared"],
)
def test_the_bytes_are_those_of_a_conversion_in_memory(
    name: str, sets: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    for out, how in (("whole", "--no-stream"), ("pieces", "--stream")):
        convert(model, tmp_path / out, how, sets=sets)
    pieces = weights(tmp_path / "pieces")
    assert pieces == weights(tmp_path / "whole")
    assert len(pieces) > 1
    found = [report(tmp_path / out)["calibration"] for out in ("whole", "pieces")]
    assert found[0] == found[1]
    assert not (tmp_path / "pieces" / SCRATCH).exists()


def test_sequential_and_parallel_differ(llama: Path, tmp_path: Path) -> None:
    """Else the test above could not tell them apart."""
    for out in ("true", "false"):
        convert(llama, tmp_path / out, "--stream", sets=[f"calibration.sequential={out}"])
    assert weights(tmp_path / "true") != weights(tmp_path / "false")


def test_kill_and_resume_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, upcycle.targets.files.finished_shards as m\n"
        "finished, count = m.Manifest.finished, [0]\n"
        "def stop(self, *args):\n"
        "    finished(self, *args)\n"
        "    count[0] += 1\n"
        "    if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "m.Manifest.finished = stop\n"
        "from upcycle.cli.main import main; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(llama, out, "--stream")],
        capture_output=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out.partial" / "new" / SCRATCH).is_dir()
    convert(llama, out, "--resume")
    convert(llama, tmp_path / "whole", "--stream")
    assert weights(out) == weights(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_other_data_is_another_conversion(llama: Path) -> None:
    """A partial directory is continued only with the data that it was begun with."""
    model = small_models.build("llama")

    def digest(*overrides: str) -> str:
        recipe = load_recipe("factorllm", [*RIDGE, *SHORT, *overrides])
        return calibration_data(model, recipe, directory=llama).digest

    assert digest() == digest()
    assert digest() != digest("calibration.tokens=256")


def test_weights_stay_in_the_file(llama: Path) -> None:
    """Every parameter is a view of the memory map, so its pages can be dropped."""
    source = open_model(str(llama))
    assert not isinstance(source, OnnxSource)
    model = source.load(mapped=True)
    addresses = [p.data_ptr() for p in model.parameters()]
    maps = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(llama / "model.safetensors"))
    ]
    assert maps, "the file is not mapped"
    assert all(any(start <= at < stop for start, stop in maps) for at in addresses)


def test_one_converted_layer_is_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sequential mode the layers before and after the current one hold no numbers."""
    loaded: list[Any] = []
    load = Source.load

    def note(source: Source, *, mapped: bool = False) -> torch.nn.Module:
        loaded.append(load(source, mapped=mapped))
        return loaded[-1]

    held = []

    def look() -> None:  # in the place of what is called when a layer has been filled
        held.append([not layer.experts.down_proj.is_meta for layer in moes(loaded[-1])])

    monkeypatch.setattr(Source, "load", note)
    monkeypatch.setattr("upcycle.conversion.mapped.give_back", look)
    recipe = load_recipe("factorllm", [*RIDGE, *SHORT])
    options = Options(stream=True)
    dense = open_dense(open_model(str(llama)), recipe, "test", tmp_path / "out", options, silent)
    scratch = tmp_path / "spool"
    with making(dense, scratch, options.workers) as made:
        assert held == [[True, False], [False, True]]
        for i, spec in enumerate(made.plan.specs):
            layer = empty_layer(spec.layer_config())
            layer.load_state_dict(load_file(scratch / f"{i}.safetensors"), assign=True)
            up_EGD = weights_of(layer).experts.up_EGD
            assert torch.equal(up_EGD, made.layer(spec).experts.up_EGD)


def moes(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ in ("MoE", "TappedMoE")]


@pytest.mark.parametrize(
    "sets",
    [
        ["experts.shared=1", "experts.shared_by=importance"],
        ["experts.shared=1", "experts.shared_by=importance", "experts.adaptive=true"],
        ["experts.shared=1", "experts.shared_by=rate", "experts.adaptive=true"],
    ],
    ids=["gradients", "gradients adaptive", "adaptive"],
)
def test_what_looks_at_the_whole_model_gives_the_same_bytes(
    llama: Path, tmp_path: Path, sets: list[str]
) -> None:
    sets = [*sets, "router.top_k=1"]
    for out, how in (("whole", "--no-stream"), ("pieces", "--stream")):
        convert(llama, tmp_path / out, how, sets=sets)
    assert weights(tmp_path / "pieces") == weights(tmp_path / "whole")


def test_an_onnx_file_adapts_the_sizes_of_its_shared_experts(tmp_path: Path) -> None:
    """Two neurons of the first FFN do all of its work, so the second shares more of its own."""
    path = onnx(tmp_path)
    proto = load_onnx(path)
    weight = proto.graph.initializer[2]  # the contraction of the first
    array = numpy_helper.to_array(weight).copy()
    array[2:] *= 1e-4
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    save_onnx(proto, path)
    sets = ("experts.shared=1", "experts.shared_by=contribution", "router.top_k=1")
    overrides = [part for key in sets for part in ("--set", key)]
    sizes = {}
    for adaptive in ("true", "false"):
        out = tmp_path / adaptive
        result = onnx_convert(path, out, *overrides, "--set", f"experts.adaptive={adaptive}")
        assert result.exit_code == 0, result.output
        sizes[adaptive] = [layer["layer"]["shared"] for layer in read_origins(out) or ()]
        again = CliRunner().invoke(main, ["verify", str(path), str(out), "--json"])
        assert json.loads(again.stdout)["checks"][0]["error"] == 0
    assert sum(sizes["true"]) == sum(sizes["false"])
    assert sizes["true"][0] < sizes["true"][1]


def test_an_onnx_file_has_no_gradients(tmp_path: Path) -> None:
    sets = ("experts.shared=1", "experts.shared_by=importance", "router.top_k=1")
    overrides = [part for key in sets for part in ("--set", key)]
    result = onnx_convert(onnx(tmp_path), tmp_path / "out", *overrides)
    assert result.exit_code == 2
    assert "look at gradients" in result.stderr
    assert not (tmp_path / "out").exists()


def onnx(tmp_path: Path) -> Path:
    return onnx_files.by_hand(tmp_path / "dense.onnx", "relu")


def onnx_convert(path: Path, out: Path, *options: str) -> Result:
    overrides = [part for key in (*RIDGE, *SHORT) for part in ("--set", key)]
    start = ["convert", str(path), "--recipe", "factorllm", "--out", str(out)]
    return CliRunner().invoke(main, [*start, *overrides, *options])


def test_an_onnx_file_is_calibrated(tmp_path: Path) -> None:
    path, out = onnx(tmp_path), tmp_path / "out"
    result = onnx_convert(path, out)
    assert result.exit_code == 0, result.output
    found = report(out)["calibration"]
    assert found["data"].startswith("random inputs, so the numbers mean little")
    assert all(row["tokens"] > 0 for row in found["layers"])
    assert "random inputs, so the numbers mean little" in (out / "README.md").read_text()


def test_an_onnx_layer_is_shown_what_the_dense_file_gives(tmp_path: Path) -> None:
    """The first FFN of this file reads the input of the graph."""
    source = OnnxSource(onnx(tmp_path))
    (value,) = source.model.graph.inputs
    assert value.shape is not None
    width = value.shape[-1]
    assert isinstance(width, int)
    x = np.random.default_rng(0).standard_normal((12, *[3] * (len(value.shape) - 2), width))
    tensors = {str(value.name): torch.from_numpy(x.astype(np.float32))}
    recipe = load_recipe("factorllm", [*RIDGE, *SHORT])
    plan = source.plan(recipe, "test")
    data = onnx_calibration(source, recipe, CalibrationInput("x", tensors=tensors))
    seen = inputs_of_ffn(plan.specs[0], source, data.batches)
    expected = tensors[str(value.name)][torch.arange(12) % 4 != 0].flatten(0, -2)
    torch.testing.assert_close(torch.cat(seen.x), expected, rtol=0, atol=0)


def test_what_an_onnx_file_does_not_read_is_refused(tmp_path: Path) -> None:
    path, out = onnx(tmp_path), tmp_path / "out"
    text, tensors = tmp_path / "text.txt", tmp_path / "x.npz"
    text.write_text("a text " * 200)
    np.savez(tensors, other=np.zeros((4, 3)))
    for given, words in ((text, "a text needs a tokenizer"), (tensors, "is missing")):
        result = onnx_convert(path, out, "--calibration", str(given))
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert not out.exists()


def test_a_source_without_data_is_refused(tmp_path: Path) -> None:
    source = OnnxSource(onnx(tmp_path))
    with pytest.raises(UsageError, match="give a text, if its tokenizer is beside it, or tensors"):
        onnx_calibration(
            source, load_recipe("factorllm"), CalibrationInput("", images=(tmp_path,) * 4)
        )
