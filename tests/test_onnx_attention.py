"""Attention in a file: what torch computes, also for tokens that attend to nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from upcycle.onnx.run import run
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx

HEADS, WIDTH = 4, 8
# Scores are sums of 8 products and outputs of up to 9, of numbers of size one, on either side.
TOLERANCE = 64 * torch.finfo(torch.float32).eps
# Inputs, scores, weights of the values and outputs, five numbers up to four, are rounded once.
HALF_TOLERANCE = 5 * 4 * 2**-11


class Attention(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def inputs(
    batch: int, queries: int, keys: int, *, mask: str = "", groups: int = HEADS
) -> dict[str, torch.Tensor]:
    """The last text has two tokens of padding, and its first queries attend to nothing."""
    draw = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": groups, "v": groups}
    lengths = {"q": queries, "k": keys, "v": keys}
    given = {
        name: torch.randn(batch, heads[name], lengths[name], WIDTH, generator=draw)
        for name in ("q", "k", "v")
    }
    if not mask:
        return given
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    seen[-1, :, :, :2] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return given | {"mask": seen if mask == "booleans" else added}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no mask": ({}, {}),
    "booleans": ({"mask": "booleans"}, {}),
    "numbers": ({"mask": "numbers"}, {}),
    "causal": ({}, {"is_causal": True}),
    "scale": ({"mask": "booleans"}, {"scale": 0.7}),
    "groups": ({"groups": 2}, {"enable_gqa": True}),
    "groups of one": ({"mask": "booleans"}, {"enable_gqa": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_torch(case: str, tmp_path: Path) -> None:
    given, options = CASES[case]
    model, path = Attention(options), tmp_path / "model.onnx"
    dynamic = {
        "q": {0: "batch", 2: "queries"},
        "k": {0: "batch", 2: "keys"},
        "v": {0: "batch", 2: "keys"},
    }
    if "mask" in given:
        dynamic["mask"] = {0: "batch", 2: "queries", 3: "keys"}
    export_onnx(model, inputs(2, 5, 6, **given), path=path, stored={}, dynamic=dynamic)
    for sizes in ((2, 5, 6), (1, 1, 9), (3, 4, 4)):
        example = inputs(*sizes, **given)
        expected = model(**example).numpy()
        assert np.isfinite(expected).all()
        (found,) = run(path, {name: t.numpy() for name, t in example.items()}).values()
        assert np.abs(found - expected).max() <= TOLERANCE, sizes
    if "mask" in given:
        assert not expected[-1, :, :2].any()  # they attend to nothing
        assert np.abs(expected[-1, :, 2:]).max() > 0.1


@pytest.mark.parametrize("case", ["booleans", "numbers", "causal", "groups"])
def test_it_computes_in_half_precision(case: str, tmp_path: Path) -> None:
    shape, options = CASES[case]
    model, path, example = Attention(options), tmp_path / "model.onnx", inputs(2, 5, 6, **shape)
    half = Onnx(dtype="float16")
    export_onnx(model, example, path=path, stored={}, options=half)
    feeds = {name: t.half() if t.is_floating_point() else t for name, t in example.items()}
    (found,) = run(path, {name: t.numpy() for name, t in feeds.items()}).values()
    assert found.dtype == np.float16
    assert np.abs(found.astype(np.float32) - model(**example).numpy()).max() <= HALF_TOLERANCE


def test_it_is_few_operations(tmp_path: Path) -> None:
    given, path = inputs(2, 5, 6, mask="booleans"), tmp_path / "model.onnx"
    export_onnx(Attention({}), given, path=path, stored={})
    found = sorted(node.op_type for node in onnx.load(path).graph.node)
    guard, product = ["Add", "IsNaN", "Slice", "Where", "Where"], ["MatMul", "MatMul", "Mul"]
    assert found == sorted([*guard, *product, "Softmax", "Transpose"])
