"""A layer with one form for short calls and another for long ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from onnx_case import moe, save
from test_onnx_forms import CLOSE, Side, distances

from upcycle.layers.moe import MoE
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.forms.choose import Choice, choose
from upcycle.targets.onnx.forms.cost_model import Work, seconds
from upcycle.targets.onnx.forms.routed import routed
from upcycle.verification.onnx.precision import kernels_of

pytestmark = pytest.mark.usefixtures("one_thread")

D = 384
SIZES = {"num_experts": 16, "width": 96, "top_k": 4, "d_model": D}
# Their forms differ for one token and for many. Erf GELU has a kernel if its tanh form will do, and
# both forms are to have that then.
TWO = ("silu", "swiglu", "gelu")


def sample(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens))


@pytest.fixture(scope="module")
def two_forms(tmp_path_factory) -> tuple[list[MoE], Path, list[Choice]]:
    layers = [moe(activation, **SIZES).eval() for activation in TWO]
    folder, model = tmp_path_factory.mktemp("two"), Side(layers)
    options, stored = Onnx(tokens=(1, 256), gelu="tanh"), save(model, folder)
    path = export_onnx(
        model, (sample(7),), path=folder / "model.onnx", stored=stored, options=options
    )
    return layers, path, [choose(routed(layer), options) for layer in layers]


def test_short_and_long_calls_get_the_form_that_is_faster_for_them(two_forms) -> None:
    layers, path, choices = two_forms
    nodes = onnx.load(path, load_external_data=False).graph.node
    branches = [node for node in nodes if node.op_type == "If"]
    assert len(branches) == len(layers)
    for layer, choice, node in zip(layers, choices, branches, strict=True):
        assert choice.forms == ("fused", "unrolled")
        assert 1 < choice.limit <= 256
        arity = layer.experts.act_fn.pointwise.arity
        gelu = "gelu" in layer.experts.act_fn.pointwise.name
        for tokens in (choice.limit - 1, choice.limit):
            doing = Work(tokens=tokens, **SIZES, arity=arity, gelu=gelu)
            is_longer = seconds("unrolled", doing) <= seconds("fused", doing)
            assert is_longer == (tokens == choice.limit)
        inside = [{n.op_type for n in a.g.node} for a in node.attribute]
        assert ["MoE" in ops for ops in inside] == [a.name == "then_branch" for a in node.attribute]


def test_both_forms_compute_the_layer(two_forms) -> None:
    layers, path, choices = two_forms
    for tokens in sorted({1, *(c.limit - 1 for c in choices), *(c.limit for c in choices), 40}):
        x_TD = sample(tokens)
        with kernels_in(layers, path):
            assert max(distances(path, layers, x_TD)) <= CLOSE
        erf = distances(path, layers, x_TD)[-1]
        assert erf > CLOSE, "the tanh form of GELU, for short and for long calls"


@contextmanager
def kernels_in(layers: list[MoE], path: Path) -> Iterator[None]:
    """Within it the layers compute what the kernels of a file do."""
    before = [layer.experts.act_fn.pointwise for layer in layers]
    for name, pointwise in kernels_of(path, [f"layers.{i}" for i in range(len(layers))]).items():
        layers[int(name.split(".")[1])].experts.act_fn.pointwise = pointwise
    yield
    for layer, pointwise in zip(layers, before, strict=True):
        layer.experts.act_fn.pointwise = pointwise


def test_a_call_runs_the_branch_of_its_length(two_forms) -> None:
    """A kernel that leaves out an expert is wrong for short calls alone."""
    layers, path, choices = two_forms
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "If")
    (fused,) = [n for a in node.attribute for n in a.g.node if n.op_type == "MoE"]
    (k,) = [a for a in fused.attribute if a.name == "k"]
    k.i -= 1
    wrong = path.with_name("wrong.onnx")
    onnx.save(model, wrong)
    for tokens, is_wrong in ((1, True), (choices[0].limit, False)):
        x_TD = sample(tokens)
        assert (distances(wrong, layers, x_TD)[0] > CLOSE) == is_wrong


def test_one_length_or_two_in_order() -> None:
    assert Onnx().calls == (256,)
    assert Onnx(tokens=7).calls == (7,)
    assert Onnx(tokens=(1, 8)).calls == (1, 8)
    for wrong in ((8, 8), (9, 8), (0, 8), 0):
        with pytest.raises(ValueError, match="tokens"):
            Onnx(tokens=wrong)  # type: ignore[arg-type]
