"""MoE layers as ONNX nodes, against the same layer in float64."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_case import ACTIVATIONS, bound, exact, moe, save
from torch import nn

from upcycle.errors import UnsupportedError
from upcycle.layers.moe import MoE
from upcycle.onnx.run import session
from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx

RULES = ("renormalised", "softmax", "one", "renorm_detach")
FUSED = ("relu", "silu", "gelu_tanh", "swiglu")
FORMS = ("fused", "unrolled")
CASES = {
    "fused": [(r, a, b) for r in RULES for a in ACTIVATIONS for b in (True, False)],
    # what the fused form has no kernel for is unrolled there too, with every rule
    "unrolled": [("softmax", a, b) for a in FUSED for b in (True, False)],
}
EVERY = [(form, *case) for form, cases in CASES.items() for case in cases]


class Side(nn.Module):
    """Layers side by side: one file tests them all."""

    def __init__(self, layers: list[MoE]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def sample(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def export(layers: list[MoE], folder: Path, shape: tuple[int, ...] = (2, 3), **options) -> Path:
    model = Side(layers)
    path = export_onnx(
        model,
        (sample(*shape, 16),),
        path=folder / "model.onnx",
        stored=save(model, folder),
        options=Onnx(**{"form": "fused", **options}),
    )
    assert not (folder / "model.onnx.data").exists()
    return path


def run(path: Path, x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(y) for y in session(path).run(None, {"x": x.numpy()})]


def error(actual: torch.Tensor, layer: MoE, x: torch.Tensor) -> float:
    expected = exact(layer, x)
    assert actual.shape == expected.shape
    return (actual.double() - expected).abs().max().item()


@pytest.fixture(scope="module")
def every_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[MoE], Path]]:
    done = {}
    for form, cases in CASES.items():
        layers = [
            moe(a, r, bias=b, num_experts=3 + i % 3, top_k=1 + i % 4 % 3, scale=0.5 + i, seed=i)
            for i, (r, a, b) in enumerate(cases)
        ]
        done[form] = layers, export(layers, tmp_path_factory.mktemp(form), (6,), form=form)
    return done


@pytest.fixture(scope="module")
def outputs(every_case) -> dict[str, list[torch.Tensor]]:
    return {form: run(path, sample(21, 16)) for form, (_, path) in every_case.items()}


@pytest.mark.parametrize("case", EVERY, ids=lambda case: "-".join(map(str, case)))
def test_rule_and_activation(every_case, outputs, case) -> None:
    form, *rest = case
    place = CASES[form].index(tuple(rest))
    layer, actual, x = every_case[form][0][place], outputs[form][place], sample(21, 16)
    assert error(actual, layer, x) <= bound(layer, x)


def test_fused_where_the_kernel_is_exact(every_case) -> None:
    graph = onnx.load(every_case["fused"][1], load_external_data=False).graph
    nodes = [n for n in graph.node if n.op_type.startswith("MoE")]
    for (_, act, _), node in zip(CASES["fused"], nodes, strict=True):
        expected = "com.microsoft" if act in FUSED else "upcycle"
        assert node.domain == expected, act


def test_functions_have_no_overloads_and_unique_names(every_case) -> None:
    for _, path in every_case.values():
        functions = onnx.load(path, load_external_data=False).functions
        names = [(f.domain, f.name) for f in functions]
        assert len(names) == len(set(names))
        assert not any(f.overload for f in functions)


@pytest.mark.parametrize("form", FORMS)
def test_reference_evaluator_runs_the_bodies(tmp_path, form) -> None:
    """Several activations, k and E in one file; and not all layers have a bias."""
    acts = FUSED if form == "fused" else ("relu", "silu", "swiglu")
    layers = [
        moe(act, rule, bias=act != "silu", num_experts=3 + i, top_k=1 + i % 3, seed=i)
        for i, (act, rule) in enumerate(zip(acts, RULES, strict=False))
    ]
    path = export(layers, tmp_path, form=form)
    x = sample(2, 5, 16)
    actual = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    for y, layer in zip(actual, layers, strict=True):
        assert error(torch.from_numpy(np.asarray(y)), layer, x) <= bound(layer, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_other_sizes_than_the_example(every_case, form, tokens) -> None:
    layers, path = every_case[form]
    x = sample(tokens, 16, seed=3)
    for y, layer in zip(run(path, x), layers, strict=True):
        assert error(y, layer, x) <= bound(layer, x)


@pytest.mark.parametrize("form", FORMS)
def test_idle_experts_and_ties(tmp_path, form) -> None:
    """All tokens on the last expert, so that the others have none; then all scores equal."""
    one = moe("relu", top_k=1, seed=1)
    ties = moe("relu", "softmax", top_k=2, seed=2)
    with torch.no_grad():
        one.router.bias.copy_(torch.tensor([0.0, 0, 0, 0, 90]))
        ties.router.weight.zero_()
        ties.router.bias.fill_(0.5)
    path = export([one, ties], tmp_path, form=form)
    x = sample(2, 6, 16)
    for y, layer in zip(run(path, x), (one, ties), strict=True):
        assert error(y, layer, x) <= bound(layer, x)


def test_output_width_may_differ(tmp_path) -> None:
    layer = moe("relu", d_out=10)
    path = export([layer], tmp_path)
    x = sample(2, 4, 16)
    (y,) = run(path, x)
    assert error(y, layer, x) <= bound(layer, x)


def test_tanh_may_stand_for_erf(tmp_path) -> None:
    layer = moe("gelu")
    path = export([layer], tmp_path, gelu="tanh")
    assert "com.microsoft" in {o.domain for o in onnx.load(path).opset_import}
    x = sample(2, 64, 16)
    (y,) = run(path, x)
    assert bound(layer, x) < error(y, layer, x) < 2e-3


def test_bound_is_broken_by_a_wrong_layer(every_case, outputs) -> None:
    """Each mistake that an export could make is larger than what rounding may do."""
    x = sample(21, 16)
    layers = every_case["fused"][0]
    for layer, y in zip(layers, outputs["fused"], strict=True):
        wrong = copy.deepcopy(layer)
        with torch.no_grad():
            wrong.experts.up_EGD.copy_(layer.experts.up_EGD.roll(1, dims=0))
        assert error(y, wrong, x) > bound(layer, x)
        wrong = copy.deepcopy(layer)
        wrong.router.scale *= 1.001
        assert error(y, wrong, x) > bound(layer, x)


def test_bound_is_broken_by_gate_and_up_in_the_wrong_order(tmp_path) -> None:
    layer = moe("swiglu")
    path = export([layer], tmp_path)
    model = onnx.load(path, load_external_data=False)
    (order,) = [
        node
        for node in model.graph.node
        if node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 2, 1, 3]
    ]
    order.op_type = "Identity"
    del order.attribute[:]
    onnx.save(model, path)
    x = sample(2, 4, 16)
    (y,) = run(path, x)
    assert error(y, layer, x) > bound(layer, x)


def test_custom_activation(tmp_path) -> None:
    """Unknown, of three expansions, with constants; and a known one under no name."""
    steps = (
        ("sigmoid", ("z0",), {}),
        ("mul", ("t0", "z1"), {}),
        ("clamp", ("t1", -0.5), {"max": 0.7}),
        ("add", ("t2", "z2"), {"alpha": 0.25}),
    )
    silu = Pointwise(1, (("sigmoid", ("z0",), {}), ("mul", ("z0", "t0"), {})))
    layers = [moe(Pointwise(3, steps)), moe(silu), moe(Pointwise(1, (("tanh", ("z0",), {}),)))]
    path = export(layers, tmp_path)
    nodes = [n for n in onnx.load(path).graph.node if n.op_type.startswith("MoE")]
    assert [n.domain for n in nodes] == ["upcycle", "com.microsoft", "upcycle"]
    assert nodes[0].op_type != nodes[2].op_type
    x = sample(2, 4, 16)
    for y, layer in zip(run(path, x)[1:], layers[1:], strict=True):
        assert error(y, layer, x) <= bound(layer, x)
    # for three expansions: hidden values below 2, so errors as in `bound` for those of size 2
    assert error(run(path, x)[0], layers[0], x) < 1e-5


def test_layer_in_low_precision_is_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0: .*float32.*bfloat16"):
        export([moe("relu").bfloat16()], tmp_path)


def test_model_is_left_as_it_was(tmp_path, capsys) -> None:
    layer = moe("relu").train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    attributes = set(vars(layer)) | set(vars(layer.experts))
    export([layer], tmp_path)
    assert layer.training
    assert set(vars(layer)) | set(vars(layer.experts)) == attributes
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
