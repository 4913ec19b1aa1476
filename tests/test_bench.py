"""``upcycle bench``: what it prints of models in every form; times are looked at by nobody."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models
from click.testing import CliRunner, Result

from upcycle.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread", "one_machine")

QUICK = ("--tokens", "1,3", "--seconds", "0")
SPLIT = [
    part
    for change in (*("layers.every=1", "layers.skip_first=0", "experts.count=8", "router.top_k=2"),)
    for part in ("--set", change)
]
WEIGHTS = ("--target", "safetensors")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def convert(model: object, out: Path, recipe: str, *options: object) -> Path:
    done = run("convert", model, "--recipe", recipe, "--out", out, "--no-verify", *options)
    assert done.exit_code == 0, done.stderr
    return out


def measured(*args: object) -> dict[str, Any]:
    done = run("bench", *args, *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def native(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(dense, tmp_path_factory.mktemp("native") / "moe", "sparse-upcycling")


def rows_of(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from found["layers"]
    yield from found["reading"]
    if found["writing"]:
        yield found["writing"]


def check_rows(found: dict[str, Any]) -> None:
    for row in rows_of(found):
        for model in ("dense", "converted"):
            times = row[model]
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert times["rounds"] >= 5
            assert times["floor"] is None or times["floor"] > 0
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_native_decoder(dense: Path, native: Path, engine: str) -> None:
    found = measured(native, "--against", dense, "--engine", engine)
    check_rows(found)
    assert found["engine"] == engine
    assert found["machine"]["flops"] > 0
    assert found["machine"]["threads"] == 1
    rows = [(row["path"], row["tokens"]) for row in found["layers"]]
    assert rows == [("model.layers.1.mlp", 1), ("model.layers.1.mlp", 3)]
    assert found["layers"][0]["visited_experts"] == 2
    assert 2 <= found["layers"][1]["visited_experts"] <= 6
    assert [row["tokens"] for row in found["reading"]] == [1, 3]
    assert found["writing"]["tokens"] == 1
    assert all(row["dense"]["floor"] for row in rows_of(found))
    assert found["costs"]["active_parameters"] < found["costs"]["parameters_after"]
    assert found["memory"]["dense"] == 4 * found["costs"]["parameters_before"]
    assert found["memory"]["converted"] == 4 * found["costs"]["parameters_after"]


@pytest.mark.usefixtures("measured_here")
def test_all_layers(dense: Path, native: Path) -> None:
    found = measured(native, "--against", dense, "--layers", 0)
    assert {row["path"] for row in found["layers"]} == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }


@pytest.mark.usefixtures("measured_here")
def test_an_encoder_with_its_own_code(tmp_path: Path) -> None:
    bert = small_models.saved("bert", tmp_path / "bert")
    moe = convert(bert, tmp_path / "moe", "emoe", *SPLIT, *WEIGHTS)
    found = measured(moe, "--against", bert)
    check_rows(found)
    assert [row["tokens"] for row in found["layers"]] == [1, 3]
    assert [row["tokens"] for row in found["reading"]] == [1, 3]
    assert found["writing"] is None


@pytest.mark.usefixtures("measured_here")
def test_a_vision_model_reads_one_batch(tmp_path: Path) -> None:
    vit = small_models.saved("vit", tmp_path / "vit")
    moe = convert(vit, tmp_path / "moe", "emoe", *SPLIT)
    for engine in ("torch", "onnx"):
        found = measured(moe, "--against", vit, "--engine", engine)
        check_rows(found)
        (row,) = found["reading"]
        assert row["tokens"] is None
        assert row["converted"]["floor"] is None
        assert found["writing"] is None
        assert found["six"]["converted"]["TT"] is None
        # Images have one size in the graph, so its layers take no other number of tokens.
        assert bool(found["layers"]) == (engine == "torch")


@pytest.mark.usefixtures("measured_here")
def test_a_plain_module(tmp_path: Path) -> None:
    given = ("--inputs", "small_models:plain_inputs")
    moe = convert("small_models:plain", tmp_path / "moe", "emoe", *SPLIT, *WEIGHTS, *given)
    named = run("bench", moe, *given, *QUICK)  # the report names the callable, which is not run
    assert "name the dense model with --against" in named.stderr
    found = measured(moe, "--against", "small_models:plain", *given)
    check_rows(found)
    assert [row["tokens"] for row in found["reading"]] == [None]


@pytest.mark.usefixtures("measured_here")
def test_layers_of_different_widths(dense: Path, tmp_path: Path) -> None:
    """`experts.adaptive` decides the widths on data: the benchmark takes them from the result."""
    options = ("--set", "experts.adaptive=true", "--set", "router.top_k=1", *WEIGHTS)
    with_tokenizer = small_models.saved("llama", tmp_path / "llama", with_tokenizer=True)
    moe = convert(with_tokenizer, tmp_path / "moe", "upcycle", *SPLIT, *options)
    sites = json.loads((moe / "config.json").read_text())["upcycle"]["sites"]
    layers = [site["layer"] for site in sites]
    assert len({layer["width"] for layer in layers}) == 2
    found = measured(moe, "--against", dense)
    numbers = sum(layer["width"] * layer["num_experts"] + layer["shared"] for layer in layers)
    assert (
        found["costs"]["parameters_after"]
        >= found["costs"]["parameters_before"] + (numbers - 2 * 64) * 3 * 32
    )


def test_the_six_metrics(dense: Path, native: Path) -> None:
    found = measured(native, "--against", dense)
    six = found["six"]
    for model in ("dense", "converted"):
        assert set(six[model]) == {"AMU", "PCU", "AL", "TT", "AEC", "MCR", "energy"}
        assert 0 < six[model]["AMU"] < 1
        assert six[model]["TT"] == 1 / six[model]["AL"]
        assert six[model]["AL"] == found["writing"][model]["median"]  # and so with the ratio
        assert six[model]["MCR"] is None  # nothing was verified
        assert (six[model]["AEC"] is None) == (six[model]["energy"] is None)


@pytest.mark.usefixtures("measured_here")
def test_tables_and_plots(dense: Path, native: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "speed.svg"
    done = run("bench", native, "--against", dense, *QUICK, "--threads", 1, "--plot", file)
    assert done.exit_code == 0, done.stderr
    for words in ("GFLOP/s", "active parameters", "model.layers.1.mlp", "reads", "writes", "MCR"):
        assert words in done.stdout
    assert "<svg" in file.read_text()


@pytest.mark.parametrize("given", ["abc", "0", "1,,2", "-1"])
def test_numbers_of_tokens(native: Path, given: str) -> None:
    done = run("bench", native, "--tokens", given)
    assert done.exit_code == 2
    assert "numbers above 0 with commas between" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_refused(dense: Path, native: Path, tmp_path: Path) -> None:
    gpt2 = small_models.saved("gpt2", tmp_path / "gpt2")
    small_models.llama(hidden_size=64).save_pretrained(tmp_path / "wider")
    weights = convert(dense, tmp_path / "moe", "sparse-upcycling", *WEIGHTS)
    for arguments, words in (
        ([tmp_path / "nowhere"], "it has no report.json; name the dense model"),
        ([dense], "it has no report.json; name the dense model"),
        ([native], "name the dense model with --against"),
        ([native, "--against", gpt2], "those of the dense model; name the model"),
        ([native, "--against", tmp_path / "wider"], "those of the dense model; name the model"),
        ([weights, "--against", dense, "--engine", "onnx"], "no model.onnx is here"),
        ([native, "--against", dense, "--plot", tmp_path / "a.txt"], "name a .png or .svg file"),
    ):
        done = run("bench", *arguments, *QUICK)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1


@pytest.mark.usefixtures("measured_here")
def test_an_encoder_decoder_reads_one_batch(tmp_path: Path) -> None:
    t5 = small_models.saved("t5", tmp_path / "t5")
    moe = convert(t5, tmp_path / "moe", "sparse-upcycling", *WEIGHTS)
    found = measured(moe, "--against", t5)
    check_rows(found)
    assert [row["tokens"] for row in found["reading"]] == [None]
    (moe / "encoder_model.onnx").touch()
    done = run("bench", moe, "--against", t5, "--engine", "onnx", *QUICK)
    assert done.exit_code == 2
    assert "an encoder and a decoder apart are not measured" in done.stderr


def test_a_missing_library_is_named(
    dense: Path, native: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from upcycle.cli import tables_of_bench as show

    monkeypatch.setattr(show, "find_spec", lambda name: None)
    done = run("bench", native, "--against", dense, "--plot", tmp_path / "a.png", *QUICK)
    assert done.exit_code == 2
    assert "pip install matplotlib" in done.stderr
