"""The road after a conversion: dense, mixture of experts, trained and saved, other formats."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_models
import torch
from command_line import run
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.rounding import ROUNDING
from upcycle.recipe.onnx import Onnx
from upcycle.targets.native.fold_router import MOST_WEIGHT_ERROR

pytestmark = pytest.mark.usefixtures("one_thread")

SAFETENSORS = ("--target", "safetensors")


def trained(directory: Path, out: Path) -> nn.Module:
    """The model after three steps, saved by transformers, so that only what it knows is kept."""
    torch.manual_seed(0)
    model: Any = upcycle.load(directory).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids = torch.randint(0, 99, (4, 16))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    if (directory / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(directory).save_pretrained(out)
    assert not (out / "report.json").exists()
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    return small_models.saved("llama", folder, with_tokenizer=True)


@pytest.fixture(scope="module")
def native(dense: Path) -> Path:
    """It as a Mixtral, trained: its experts are no copies any more."""
    out = dense.parent / "mixtral"
    run("convert", dense, "--recipe", "sparse-upcycling", *SAFETENSORS, "--out", out)
    trained(out, dense.parent / "mixtral-trained")
    return dense.parent / "mixtral-trained"


@pytest.fixture(scope="module")
def own(dense: Path) -> Path:
    """It with layers of upcycle, whose weights no native architecture follows, trained."""
    out = dense.parent / "own"
    loose = ("--set", "verify.max_relative_error=10")
    sizes = ("--set", "experts.count=4", "--set", "router.top_k=2")
    run("convert", dense, "--recipe", "moefication", *sizes, *loose, *SAFETENSORS, "--out", out)
    trained(out, dense.parent / "own-trained")
    return dense.parent / "own-trained"


def onnx_logits(file: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file)
    feeds: dict[str, Any] = {"input_ids": ids_BS.numpy()}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids_BS), value.shape[1], 0, value.shape[3]), "f4")
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(ids_BS.shape[1])[None].repeat(len(ids_BS), 0)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(tuple(ids_BS.shape), "i8")
        elif value.name == "token_type_ids":
            feeds[value.name] = np.zeros(tuple(ids_BS.shape), "i8")
    return torch.from_numpy(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("which", ["native", "own"])
def test_a_trained_decoder_becomes_onnx(which: str, request: Any, tmp_path: Path) -> None:
    directory = request.getfixturevalue(which)
    found = json.loads(run("export", directory, "--out", tmp_path / "onnx", "--json").stdout)
    assert found["form"] == "onnx"
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= set(found["files"])
    assert all(check["passed"] for check in found["checks"])
    ids_BS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = upcycle.load(directory)(ids_BS).logits
    error = (onnx_logits(tmp_path / "onnx" / "model.onnx", ids_BS) - expected).abs().max()
    assert error / expected.abs().max() <= ROUNDING[torch.float32]
    graph = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert b"past_key_values.0.key" in graph
    assert b"com.microsoft" in graph or b"MoE_" in graph  # its experts are a node


def test_bert_tiny_is_converted_trained_and_exported(tmp_path: Path) -> None:
    moe, again = tmp_path / "moe", tmp_path / "trained"
    run("convert", "sample:bert-tiny", "--recipe", "sparse-upcycling", *SAFETENSORS, "--out", moe)
    model = trained(moe, again)
    listed = run("inspect", again).stdout
    assert "upcycle_bert (layers of upcycle), float32" in listed
    assert "2 MoE layers found" in listed
    said = run("verify", "sample:bert-tiny", again).stdout
    assert "verdict: trained further" in said
    assert "FAILED" not in said
    assert run("diff", moe, again, code=3).stdout.endswith("different\n")
    table = run("export", again, "--out", tmp_path / "onnx").stdout
    assert re.search(r"ONNX Runtime against PyTorch +[0-9.e-]+ +1.00e-05 +ok", table)
    ids_BS = torch.arange(5, 14)[None]
    with torch.no_grad():
        expected = model(ids_BS).logits
    error = (onnx_logits(tmp_path / "onnx" / "model.onnx", ids_BS) - expected).abs().max()
    assert error / expected.abs().max() <= ROUNDING[torch.float32]
    refused = run("verify", "sample:bert-tiny", tmp_path / "onnx", code=2).stderr
    assert "an ONNX file and no weights beside it" in refused


@pytest.mark.usefixtures("measured_here")
def test_inspect_verify_and_bench_know_a_trained_native_model(dense: Path, native: Path) -> None:
    found = json.loads(run("inspect", native, "--json").stdout)
    assert found["architecture"] == "mixtral"
    assert [row["num_experts"] for row in found["layers"]] == [8, 8]
    assert {row["top_k"] for row in found["layers"]} == {2}
    verified = json.loads(run("verify", dense, native, "--json").stdout)
    assert verified["recipe"] == "trained"
    assert verified["costs"]["parameters_after"] > verified["costs"]["parameters_before"]
    quick = ("--tokens", "4", "--seconds", "0", "--json")
    timed = json.loads(run("bench", native, "--against", dense, *quick).stdout)
    assert timed["reading"][0]["tokens"] == 4
    assert len(timed["layers"]) == 1


def test_rounded_experts(native: Path, tmp_path: Path) -> None:
    small = ("--set", "onnx.form=quantised", "--set", "onnx.quantise=8")
    found = json.loads(run("export", native, "--out", tmp_path / "q", *small, "--json").stdout)
    assert found["onnx"]["relative"] > ROUNDING[torch.float32]
    assert len(found["onnx"]["layers"]) == 2


def test_layers_of_upcycle_become_native_if_asked(own: Path, tmp_path: Path) -> None:
    """Mixtral has no weights of one; with a tempered router they are nearly equal."""
    native = ("--target", "native", "--architecture", "mixtral")
    found = json.loads(run("export", own, *native, "--out", tmp_path / "mixtral", "--json").stdout)
    assert found["form"] == "mixtral"
    passed = {check["what"]: check["passed"] for check in found["checks"]}
    assert passed == dict.fromkeys(passed, True)
    assert "weights of a tempered router" in passed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    ids_BS = torch.arange(9)[None]
    with torch.no_grad():
        ours, theirs = upcycle.load(own)(ids_BS).logits, loaded(ids_BS).logits
    error = ((ours - theirs).norm() / ours.norm()).item()
    assert 0 < error <= MOST_WEIGHT_ERROR  # of an expert's weight, and so of its output


def test_what_only_copies_allow_is_refused_after_training(dense: Path, tmp_path: Path) -> None:
    """Weights of one fit Mixtral's by a factor on equal experts, and not on others."""
    out = tmp_path / "own"
    sizes = ("--set", "experts.count=4", "--set", "router.weights=one")
    scale = ("--set", "router.scale=0.5")
    recipe = ("--recipe", "sparse-upcycling", *sizes, *scale)
    run("convert", dense, *recipe, *SAFETENSORS, "--out", out)
    trained(out, tmp_path / "trained")
    with pytest.raises(UnsupportedError, match="weights `one`"):
        upcycle.export(tmp_path / "trained", tmp_path / "x", target="native")
    assert not (tmp_path / "x").exists()


def test_a_plain_module(tmp_path: Path) -> None:
    model, x = small_models.plain(), torch.randn(3, 16)
    done = upcycle.convert(model, "split-all", (x,), overrides=["experts.count=4"])
    done.save(tmp_path / "moe")
    with pytest.raises(UsageError, match=r"give upcycle\.load the dense model"):
        upcycle.export(tmp_path / "moe", tmp_path / "onnx")
    upcycle.export(tmp_path / "moe", tmp_path / "onnx", model=small_models.plain(),
                   example_inputs=(x,))  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = model(x)
    assert (torch.from_numpy(y) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_refusals(dense: Path, native: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, code, sentence in (
        ((dense,), 2, "no layer of it is a mixture of experts"),
        ((native, "--set", "experts.count=3"), 2, "only keys of the section `onnx`"),
        ((native, "--set", "onnx.form=many"), 2, "onnx.form"),
        ((native, "--target", "native"), 4, "an architecture of transformers already"),
        ((own, "--target", "native"), 4, "not as"),
        ((native, "--architecture", "mixtral"), 2, "it is for --target native"),
        ((native, "--runtime", "vllm"), 2, "it is for --target native"),
        ((own, "--target", "native", "--set", "onnx.gelu=tanh"), 2, "it is for --target onnx"),
        ((native, "--gguf-type", "f16"), 2, "it is for --target gguf"),
        ((tmp_path,), 2, "neither config.json nor upcycle.json"),
    ):
        ended = run("export", *arguments, "--out", out, code=code)
        assert sentence in ended.stderr
        assert "bug" not in ended.stderr
        assert not out.exists()
        assert not out.with_name("out.partial").exists()
    out.mkdir()
    assert "exists" in run("export", native, "--out", out, code=2).stderr
    ended = run("export", native, "--out", native, "--overwrite", code=2)
    assert (native / "config.json").is_file()
    assert "upcycle export" in run("convert", own, "--recipe", "emoe", "--out", tmp_path / "y",
                                   code=4).stderr  # fmt: skip


def test_the_target_of_python() -> None:
    with pytest.raises(UsageError, match="choose from onnx, native"):
        upcycle.export("a", "b", target="gguf7")  # type: ignore[arg-type]
    assert Onnx().form == "auto"
