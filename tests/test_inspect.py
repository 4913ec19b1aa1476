"""``inspect`` of converted directories, the origin of their rows, and ``diff`` of two models."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_files
import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from upcycle.cli.inspection import inspect_converted, is_converted
from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.targets.provenance_file import FILE, neurons_of, runs

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = {
    "copies": ("sparse-upcycling",),
    "slices": ("granular",),
    "split": ("moefication", "--set", "experts.count=6", "--set", "router.top_k=2"),
    "drawn": ("drop-upcycling",),
    "low-rank": ("upcycle", "--set", "experts.count=4", "--set", "compensate.low_rank=2"),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def convert(model: Path, out: Path, recipe: str, *options: str) -> Path:
    loose = ("--set", "verify.max_relative_error=10", "--target", "safetensors", "-q")
    small = () if recipe != "upcycle" else ("--set", "calibration.tokens=256")
    arguments = ("--recipe", recipe, *small, "--out", out, *loose, *options)
    done = run("convert", model, *arguments)
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    return small_models.saved("llama", directory, with_tokenizer=True)


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    return {name: convert(llama, root / name, *options) for name, options in RECIPES.items()}


@pytest.mark.parametrize(
    ("neurons", "text"),
    [
        ([0, 1, 2, 3], "0-3"),
        ([3, 5, 6, 7, 2], "3 5-7 2"),
        ([4, 3], "4 3"),
        ([1, 2, -1, -1, -2, 0, -1], "1-2 zero*2 new*1 0 zero*1"),
        ([0, 1, 0, 1], "0-1 0-1"),
        ([], ""),
    ],
)
def test_runs_say_the_rows_in_their_order(neurons: list[int], text: str) -> None:
    assert runs(neurons) == text
    assert neurons_of(text) == neurons


def test_the_rows_are_those_of_the_dense_model(llama: Path, converted: dict[str, Path]) -> None:
    """What the file says, held against the weights themselves."""
    dense = load_file(llama / "model.safetensors")
    stored = load_file(converted["slices"] / "model.safetensors")
    for layer in inspect_converted(converted["slices"])["layers"]:
        gate = dense[f"{layer['path']}.gate_proj.weight"]
        prefix = f"{layer['path'].removesuffix('mlp')}block_sparse_moe.experts"
        for expert, text in enumerate(layer["expert_rows"]):
            made = stored[f"{prefix}.{expert}.w1.weight"]
            assert torch.equal(made, gate[neurons_of(text)])


def test_the_counts(converted: dict[str, Path]) -> None:
    def rows(name: str) -> dict[str, int]:
        counted: dict[str, int] = inspect_converted(converted[name])["layers"][0]["rows"]
        return counted

    zero = dict.fromkeys(["once", "several_times", "nowhere", "padding", "drawn_anew"], 0)
    assert rows("copies") == zero | {"several_times": 64}
    assert rows("split") == zero | {"once": 64, "padding": 2}  # 6 experts of 11 for 64 neurons
    drawn = rows("drawn")
    assert drawn["drawn_anew"] == 8 * 32  # half of the neurons of 8 experts
    assert drawn["once"] + drawn["several_times"] + drawn["nowhere"] == 64


def test_a_converted_directory_is_shown(converted: dict[str, Path]) -> None:
    done = run("inspect", converted["copies"])
    assert done.exit_code == 0, done.stderr
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert lines[0][0] == f"{converted['copies']}: native mixtral, float32"
    assert lines[1][0].startswith("made from llama by sparse-upcycling (upcycle ")
    layer = next(line for line in lines if line[0] == "model.layers.{0..1}.mlp")
    assert layer[1:4] == ["8 of 64, copy", "normal (linear), top_k 2, renormalised", "none"]
    assert any("0-63" in line for line in lines)
    split = run("inspect", converted["split"]).stdout
    assert "64 once, 2 rows of zeros" in split
    compensated = run("inspect", converted["low-rank"]).stdout
    assert "low_rank 2" in compensated


def test_json_has_the_whole_lists(converted: dict[str, Path]) -> None:
    found = json.loads(run("inspect", converted["split"], "--json").stdout)
    assert found["form"] == "remote_code" if found["architecture"] != "mixtral" else "native"
    (first, _) = found["layers"]
    neurons = [n for text in first["expert_rows"] for n in neurons_of(text)]
    assert sorted(n for n in neurons if n >= 0) == list(range(64))
    assert first["router"]["select"] == {"rule": "top_k", "k": 2}
    assert found["runtimes"]["transformers"]["level"] in ("yes", "limits")


def test_a_plain_module_and_a_streamed_model_too(llama: Path, tmp_path: Path) -> None:
    module = tmp_path / "module"
    options = ("--inputs", "small_models:plain_inputs", "--target", "safetensors", "-q")
    done = run(
        *("convert", "small_models:plain", "--recipe", "sparse-upcycling", "--out", module),
        *options,
    )
    assert done.exit_code == 0, done.stderr
    assert inspect_converted(module)["form"] == "module"
    streamed = convert(llama, tmp_path / "streamed", "granular", "--stream")
    whole = convert(llama, tmp_path / "whole", "granular")
    assert (streamed / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_an_onnx_file_too(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    out = tmp_path / "out"
    done = run("convert", path, "--recipe", "sparse-upcycling", "--out", out, "-q")
    assert done.exit_code == 0, done.stderr
    found = inspect_converted(out)
    assert (found["form"], found["onnx"]) == ("onnx", ["model.onnx"])
    assert found["layers"][0]["rows"]["nowhere"] == 0


def test_the_source_of_each_expert_is_shown(llama: Path, tmp_path: Path) -> None:
    other = small_models.build("llama", seed=1)
    other.save_pretrained(tmp_path / "other")
    sources = f"experts.sources=[base, {tmp_path / 'other'}]"
    options = ("clip-moe", "--set", "experts.count=2", "--set", sources)
    out = convert(llama, tmp_path / "moe", *options)
    assert len(set(inspect_converted(out)["layers"][0]["sources"])) == 2
    assert "0 from base" in run("inspect", out).stdout


def test_an_older_directory_and_a_damaged_one(
    llama: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    older = shutil.copytree(converted["copies"], tmp_path / "older")
    (older / FILE).unlink()
    done = run("inspect", older)
    assert done.exit_code == 0
    assert "no provenance.json: an older upcycle wrote this directory" in done.stdout
    (older / FILE).write_text('{"layers": [{}]}')
    done = run("inspect", older)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {older / FILE}: not what this version of upcycle writes")
    (older / FILE).write_text("{")
    assert f"{older / FILE}: not JSON" in run("inspect", older).stderr
    (older / FILE).write_text('{"layers": 3}')
    assert "not what this version of upcycle writes (layers: " in run("inspect", older).stderr
    data = json.loads((converted["copies"] / FILE).read_text("utf-8"))
    data["layers"][0]["sources"] = ["base"]  # and there are several experts
    (older / FILE).write_text(json.dumps(data))
    assert "not what this version of upcycle writes" in run("inspect", older).stderr
    data["layers"][0] |= {"sources": [], "experts": data["layers"][0]["experts"][:-1]}
    (older / FILE).write_text(json.dumps(data))  # rows of all experts but one
    for command in (("inspect", older), ("verify", llama, older)):
        done = run(*command)
        assert done.exit_code == 2
        assert "not what" in done.stderr


def test_a_dense_model_is_inspected_as_before(llama: Path, tmp_path: Path) -> None:
    assert not is_converted(llama)
    copy = shutil.copytree(llama, tmp_path / "dense")
    (copy / "report.json").write_text("not ours")
    done = run("inspect", copy)
    assert done.exit_code == 0
    assert "2 dense FFNs found" in done.stdout
    with pytest.raises(UsageError, match="this is not an output of upcycle"):
        inspect_converted(llama)


def test_equal_models_have_no_difference(llama: Path) -> None:
    done = run("diff", llama, llama)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "equal"


def test_dense_and_converted(llama: Path, converted: dict[str, Path]) -> None:
    done = run("diff", llama, converted["copies"])
    assert done.exit_code == 3
    rows = {line.split("  ")[0] for line in done.stdout.splitlines()}
    assert "model.layers.{0..1}.mlp.gate_proj.weight" in rows
    assert "model.layers.{0..1}.block_sparse_moe.experts.{0..7}.w1.weight" in rows
    assert "num_local_experts" in rows
    found = json.loads(run("diff", llama, converted["copies"], "--json").stdout)
    assert not found["different_tensors"]
    kept = set(load_file(llama / "model.safetensors")) - {r["name"] for r in found["only_a"]}
    assert found["equal_tensors"] == len(kept)
    field = next(row for row in found["config"] if row["field"] == "model_type")
    assert field == {"field": "model_type", "a": "llama", "b": "mixtral"}


def changed(llama: Path, out: Path, change: Any) -> dict[str, Any]:
    """The difference to a copy of the model in which `change` was called on the tensors."""
    shutil.copytree(llama, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = run("diff", llama, out, "--json")
    assert done.exit_code == 3
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_largest_difference_of_a_tensor(llama: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][3] += 0.5

    (row,) = changed(llama, tmp_path / "other", change)["different_tensors"]
    assert (row["name"], row["max"], row["relative"]) == (name, 0.5, 0.5)  # the norm is one
    shown = run("diff", llama, tmp_path / "other").stdout
    assert "model.norm.weight  0.5" in shown
    assert shown.splitlines()[-1] == "different"


def test_shapes_dtypes_and_nan(llama: Path, tmp_path: Path) -> None:
    norm, head, embedding = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[norm] = tensors[norm][:8].clone()
        tensors[head] = tensors[head].double()
        tensors[embedding] = tensors[embedding].clone()
        tensors[embedding][0, 0] = float("nan")

    rows = {row["name"]: row for row in changed(llama, tmp_path / "o", change)["different_tensors"]}
    assert rows[norm]["shapes"] == [[32], [8]]
    assert rows[norm]["max"] is None
    assert rows[head]["dtypes"] == ["float32", "float64"]
    assert rows[head]["max"] == 0.0
    assert rows[embedding]["max"] is None  # JSON has no NaN
    text = run("diff", llama, tmp_path / "o").stdout
    assert "shapes [32] and [8]" in text
    assert "nan" in text


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (shutil.rmtree, "no such file or directory"),
        (lambda d: (d / "model.safetensors").unlink(), "there is neither model.safetensors nor"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x"), "not a whole safetensors file"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    ],
)
def test_a_damaged_directory_is_one_sentence(
    llama: Path, tmp_path: Path, prepare: Any, sentence: str
) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    prepare(other)
    done = run("diff", llama, other)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
