"""ONNX in, ONNX out: routers of every kind, shared experts and compensation; forms and rounding."""

from pathlib import Path

import numpy as np
import onnx
import onnx_files
import pytest

from upcycle.conversion.options import Options
from upcycle.conversion.pipeline import convert_model
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.report import Report
from upcycle.models.named import open_model
from upcycle.onnx.run import run
from upcycle.recipe.reader import load_recipe
from upcycle.verification.checks import NODES

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "verify.max_relative_error=99",
    "layers.every=1",
    "layers.skip_first=0",
    "layers.skip_last=0",
)
RECIPES = {  # shipped recipe -> what makes it fit 32 neurons
    "moefication": ("experts.count=8", "router.top_k=3"),  # a small network
    "gnt-move": (),  # cosines
    "cmoe": ("experts.count=8", "experts.shared=2", "router.top_k=3"),  # neurons, gain, balance
    "harder-tasks": ("experts.count=4",),  # top_p
    "dynmole": ("experts.count=4",),  # entropy
    "adamoe": ("experts.count=4", "router.top_k=3"),  # null experts
    "sparse-upcycling-encoder": ("experts.count=4",),  # experts choose
    "smoe-dropout": ("experts.count=4", "router.top_k=2"),  # frozen
    "upcycle": ("experts.count=8", "router.top_k=3"),  # compensation
}


def convert(path: Path, out: Path, recipe: str, *changes: str) -> Report:
    loaded = load_recipe(recipe, [*SMALL, *changes])
    targets = ("safetensors", "onnx")
    return convert_model(
        open_model(str(path)), loaded, recipe_name=recipe, out=out, options=Options(targets=targets)
    )


def found(report: Report, what: str) -> float:
    (error,) = [c.error for c in report.checks if c.what.startswith(what)]
    return float(error)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_is_what_torch_has(recipe: str, tmp_path: Path) -> None:
    """The check of the conversion compares the nodes with the layer; it has to have looked."""
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "swiglu")
    report = convert(path, tmp_path / "out", recipe, *RECIPES[recipe])
    assert all(check.passed for check in report.checks)
    assert found(report, NODES) <= 1e-5
    assert all(row.nodes_relative is not None for row in report.layers)
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)


def test_a_convolution_with_shared_experts(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "convolution")
    report = convert(path, tmp_path / "out", "cmoe", *RECIPES["cmoe"])
    assert found(report, NODES) <= 1e-5


@pytest.mark.parametrize("method", ["oracle", "hash"])
def test_routers_that_no_file_can_have_are_refused(method: str, tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    changes = ("experts.count=4", f"router.method={method}", "router.tied=false", "router.top_k=2")
    with pytest.raises(UnsupportedError, match=r"oracle runs every expert|reads token ids"):
        convert(path, tmp_path / "out", "emoe", *changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["8", "4"])
def test_rounded_experts_of_a_file(bits: str, tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "swiglu")
    out = tmp_path / "out"
    options = ("onnx.form=quantised", f"onnx.quantise={bits}", "onnx.block=row")
    report = convert(path, out, "split-all", "experts.count=2", *options)
    assert all(check.passed for check in report.checks)
    assert len(report.rounding.layers) == 2
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "QMoE" for node in nodes) == 2
    names = {file.name for file in out.iterdir()}
    assert "model.onnx.data" in names
    assert not any("safetensors" in name for name in names)
    low, high = (1e-4, 0.05) if bits == "8" else (1e-2, 0.6)
    x = {"x": np.random.default_rng(3).standard_normal((2, 5, 16)).astype(np.float32)}
    (dense,), (rounded,) = (run(p, x).values() for p in (path, out / "model.onnx"))
    assert low < np.abs(rounded - dense).max() / np.abs(dense).max() < high


def test_portable_files(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    convert(path, tmp_path / "out", "split-all", "experts.count=4", "onnx.profile=portable")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {f.domain for f in model.functions} == {"upcycle"}
    assert not any(node.domain == "com.microsoft" for node in model.graph.node)


def test_a_file_keeps_its_type(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    with pytest.raises(UsageError, match=r"onnx\.dtype: float16: an ONNX file keeps its type"):
        convert(path, tmp_path / "out", "split-all", "experts.count=4", "onnx.dtype=float16")
