"""Rounded weights: experts by `onnx.quantise`, a whole model by `onnx.weights: int8`."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_files
import pytest
import small_models
import torch
from command_line import run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_case import moe
from pydantic import ValidationError
from torch import nn

from upcycle.data.verification_inputs import evaluation_for
from upcycle.onnx.run import run as run_file
from upcycle.onnx.run import session
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.forms.int8 import SCALE, SUFFIX, int8
from upcycle.targets.onnx.write import write_onnx
from upcycle.verification.onnx.matrices import matrices_of, rounded_matrices, verify_matrices
from upcycle.verification.onnx.precision import verify_precision

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8
DECODER: dict[str, Any] = {"tokens": (1, 256)}  # the matrices stay in 8 bits in memory


class Tokens(nn.Module):
    """An embedding that is the head, too, a linear map, and MoE layers between them."""

    def __init__(self, *activations: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(90, 32)
        self.mixed = nn.Linear(32, 32)
        self.layers = nn.ModuleList(
            moe(name, d_model=32, width=48, seed=i) for i, name in enumerate(activations)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mixed(self.table(ids))
        for layer in self.layers:
            x = x + layer(x)
        return x @ self.table.weight.T


def written(folder: Path, options: Onnx, *activations: str) -> tuple[Path, nn.Module]:
    model = Tokens(*activations).eval()
    ids = torch.arange(12).reshape(2, 6)
    path = export_onnx(model, (ids,), path=folder / "model.onnx", stored={}, options=options)
    return path, model


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def operations(path: Path) -> list[str]:
    """Of the graph and its functions, with the domain of those that are not standard."""
    model = onnx.load(path, load_external_data=False)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    return [f"{node.domain}:{node.op_type}".lstrip(":") for node in nodes]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 70), st.sampled_from(["auto", "row", "adaptive", 16, 64]),
    st.integers(0, 99),
)  # fmt: skip
def test_no_element_is_off_by_more_than_half_a_step(rows, columns, block, seed) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = int8(weight, block)
    assert found.numbers.dtype == torch.int8
    assert columns % found.block == 0
    assert ((found.floats() - weight).abs() <= found.steps() * 0.50001).all()


@pytest.mark.parametrize("more", [{}, DECODER, {"profile": "portable"}], ids=str)
def test_every_matrix_but_those_of_routers_has_8_bits(tmp_path: Path, more: Any) -> None:
    path, model = written(tmp_path, Onnx(weights="int8", **more), "relu", "gelu")
    onnx.checker.check_model(path, full_check=True)
    tensors = initializers(path)
    left = [
        name
        for name, tensor in tensors.items()
        if tensor.data_type == FLOAT and len(tensor.dims) > 1 and not name.endswith(SCALE)
    ]
    assert all("router" in name or "bias" in name for name in left), left
    assert (
        sum(tuple(t.dims) == (90, 32) for t in tensors.values()) == 1
    )  # the tied table is there once
    assert sum("router.weight" in name for name in left) == 2
    sizes = sum(parameter.numel() for parameter in model.parameters())
    assert path.with_name("model.onnx.data").stat().st_size < 0.4 * 4 * sizes
    if more.get("profile") == "portable":
        assert {name.rpartition(":")[0] for name in operations(path)} <= {"", "upcycle"}


@pytest.mark.parametrize("more", [{}, DECODER], ids=["unpacked", "packed"])
def test_the_file_computes_with_the_rounded_matrices(tmp_path: Path, more: Any) -> None:
    """Apart from the kernels that round tokens, too, which the verification's session has not."""
    path, model = written(tmp_path, Onnx(weights="int8", **more), "gelu")
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and "router" not in name and "bias" not in name:
            tensor.copy_(int8(tensor, "auto").floats())
    ids = torch.arange(9)[None]
    (made,) = run_file(path, {"ids": ids.numpy()}).values()
    expected = model(ids)
    assert np.abs(made - expected.detach().numpy()).max() <= 1e-5 * expected.abs().max()
    model.load_state_dict(kept)
    assert np.abs(made - model(ids).detach().numpy()).max() > 1e-4 * expected.abs().max()
    assert ("DequantizeLinear" in operations(path)[-40:]) or not more


@pytest.mark.parametrize("form", ["auto", "unrolled"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "geglu"])
def test_quantise_rounds_experts_whatever_they_compute(
    tmp_path: Path, form: Any, activation: str
) -> None:
    path, _ = written(tmp_path, Onnx(quantise=8, form=form), activation)
    tensors = initializers(path)
    experts = [t.data_type for n, t in tensors.items() if "experts" in n and n.endswith(SUFFIX)]
    assert len(experts) == 2
    assert tensors["table.weight"].data_type == FLOAT  # experts alone


def test_adaptive_blocks_are_what_each_matrix_asks_for(tmp_path: Path) -> None:
    model = Tokens("relu").eval()
    with torch.no_grad():
        model.mixed.weight[:, ::16] *= 30
        model.table.weight.sign_()  # magnitudes that are alike
    found = {}
    for block in ("auto", "adaptive", 16):
        options = Onnx(weights="int8", block=block, **DECODER)  # type: ignore[arg-type]
        folder = tmp_path / str(block)
        folder.mkdir()
        ids = torch.arange(12).reshape(2, 6)
        path = export_onnx(model, (ids,), path=folder / "m.onnx", stored={}, options=options)
        found[block] = {len(m.numbers): m.block for _, m in rounded_matrices(path)}  # by rows
        _, checks = verify_matrices([path], matrices_of(model))
        assert all(check.passed for check in checks)
    table, mixed = 90, 32
    assert found["auto"] == {table: 32, mixed: 32}
    assert found["adaptive"] == {table: 32, mixed: 16}
    assert found[16] == {table: 16, mixed: 16}


def test_a_token_at_a_time_takes_the_node(tmp_path: Path) -> None:
    path, _ = written(tmp_path, Onnx(quantise=8, tokens=1), "relu")
    assert "com.microsoft:QMoE" in operations(path)


def test_four_bits_that_no_node_reads_become_eight_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        path, _ = written(tmp_path, Onnx(quantise=4), "relu", "gelu")
    assert "1 of 2 MoE layers have weights of 8 bits and not of 4" in caplog.text
    names = [name for name in initializers(path) if "experts" in name]
    assert sum(name.endswith(".int4") for name in names) == 2
    assert sum(name.endswith(SUFFIX) for name in names) == 2


@pytest.mark.parametrize("form", ["fused", "dense"])
@pytest.mark.parametrize("rounds", [{"quantise": 8}, {"weights": "int8"}], ids=str)
def test_forms_of_floats_are_refused(form: Any, rounds: Any) -> None:
    with pytest.raises(ValidationError, match=f"`form: {form}` keeps the experts in floats"):
        Onnx(form=form, **rounds)


def test_other_widths_of_weights_are_refused() -> None:
    with pytest.raises(ValidationError, match="'float' or 'int8'"):
        Onnx(weights="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_models_of_transformers(tmp_path: Path, name: str) -> None:
    model = small_models.build(name).eval()
    evaluation, options = evaluation_for(model), Onnx(weights="int8")
    write_onnx(tmp_path, model, evaluation.batches[0], {}, options)
    facts, checks = verify_precision(tmp_path, model, evaluation, options)
    assert all(check.passed for check in checks), checks
    assert any(check.what == "ONNX Runtime against PyTorch" for check in checks)
    assert facts is not None
    assert facts.matrices is not None
    assert facts.outputs is not None
    assert facts.matrices.bytes_after < 0.3 * facts.matrices.bytes_before
    assert 1e-4 < facts.outputs.relative < 0.1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_wrong_scale_is_noticed(tmp_path: Path, dtype: Any) -> None:
    path, model = written(tmp_path, Onnx(weights="int8", dtype=dtype), "gelu")
    facts, (check,) = verify_matrices([path], matrices_of(model))
    assert check.passed
    assert facts is not None
    assert facts.count == 2
    proto = onnx.load(path)
    (scale,) = [
        t for t in proto.graph.initializer if t.name.startswith("table") and SCALE in t.name
    ]
    wrong = onnx.numpy_helper.to_array(scale) * 1.02
    scale.CopyFrom(onnx.numpy_helper.from_array(wrong.astype(dtype), scale.name))
    onnx.save(proto, path)
    _, (check,) = verify_matrices([path], matrices_of(model))
    assert not check.passed
    assert "table" in check.what


def test_a_matrix_of_another_model_is_noticed(tmp_path: Path) -> None:
    path, model = written(tmp_path, Onnx(weights="int8"), "gelu")
    named = {name: tensor.flip(0) for name, tensor in matrices_of(model).items()}
    _, (check,) = verify_matrices([path], named)
    assert not check.passed
    _, (check,) = verify_matrices([path], {})
    assert not check.passed


def test_the_profile_for_cuda_keeps_8_bits_in_memory(tmp_path: Path) -> None:
    """It is float16, which is run on a CPU here."""
    path, model = written(tmp_path, Onnx(weights="int8", profile="cuda"), "relu")
    kinds = {tensor.data_type for tensor in initializers(path).values() if len(tensor.dims) > 1}
    assert INT8 in kinds
    assert "com.microsoft:QMoE" in operations(path)
    ids = torch.arange(9)[None]
    (made,) = session(path).run(None, {"ids": ids.numpy()})
    expected = model(ids).detach().numpy()
    assert np.abs(made - expected).max() < 0.1 * np.abs(expected).max()


def test_an_onnx_file(tmp_path: Path) -> None:
    dense = tmp_path / "in"
    dense.mkdir()
    path, _ = written(dense, Onnx())
    layer = onnx_files.by_hand(tmp_path / "layer.onnx", "swiglu")
    out = tmp_path / "out"
    sizes = ("--set", "experts.count=2", "--set", "onnx.weights=int8")
    run("convert", layer, "--recipe", "split-all", *sizes, "--out", out)
    report = json.loads((out / "report.json").read_text())
    assert len(report["rounding"]["layers"]) == 2
    assert all(check["passed"] for check in report["checks"])
    kinds = [t.data_type for t in initializers(out / "model.onnx").values() if len(t.dims) == 3]
    assert kinds.count(INT8) == 4
    assert path.is_file()
    again = json.loads(run("verify", layer, out, "--json").stdout)
    assert again["end_to_end"] == report["end_to_end"]
    assert "Before the weights were rounded: The outputs" in (out / "README.md").read_text()


def test_the_road_of_a_user(tmp_path: Path) -> None:
    """convert, verify, and export of the same model, with its quality in words and numbers."""
    dense, out, again = tmp_path / "dense", tmp_path / "out", tmp_path / "again"
    small_models.saved("llama", dense, with_tokenizer=True)
    sizes = ("--set", "experts.count=2")
    rounded = ("--set", "onnx.weights=int8")
    shown = run("convert", dense, "--recipe", "sparse-upcycling", *sizes, *rounded, "--out", out)
    assert "the ONNX file against the model in float32" in shown.stdout
    assert "Rounded to 8 bits beside the experts of" in shown.stdout
    facts = json.loads((out / "report.json").read_text())["onnx"]
    assert facts["matrices"]["count"] > 4
    assert facts["outputs"]["language_model"]["top1_agreement"] > 0.5
    assert "Rounded to 8 bits" in run("verify", dense, out).stdout
    found = json.loads(run("export", out, *rounded, "--out", again, "--json").stdout)
    assert found["onnx"]["matrices"]["count"] == facts["matrices"]["count"]
    shutil.rmtree(again)
    wrong = run("export", out, *rounded, "--set", "onnx.form=dense", "--out", again, code=2)
    assert "keeps the experts in floats" in wrong.stderr
