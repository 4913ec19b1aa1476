"""Every router and activation in every form, and which form a profile chooses."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_case import ACTIVATIONS, exact, moe, save
from torch import nn

from upcycle.layers.config import SelectConfig
from upcycle.layers.moe import MoE
from upcycle.onnx.run import session
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.forms.choose import Choice, choose, fused_form
from upcycle.targets.onnx.forms.cost_model import NANOSECONDS, Work, seconds
from upcycle.targets.onnx.forms.routed import routed
from upcycle.verification.onnx.rounded_layers import rounded_layers
from upcycle.verification.onnx.rounding import verify_rounding, weighted_sum

pytestmark = pytest.mark.usefixtures("one_thread")

D, WIDTH, E = 16, 12, 5
CLOSE = 1e-5  # of the largest output: what every form promises in float32
ROUTER_KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"kind": "mlp", "hidden": 7},
    "cosine": {"kind": "cosine", "hidden": 3},
    "noisy": {"kind": "noisy"},
    "neurons": {"kind": "neurons"},
    "balanced": {"balance": True},
    "frozen": {"frozen": True},
    "top_p": {"select": SelectConfig(rule="top_p", k=3, mass=0.6), "weights": "softmax"},
    "entropy": {"select": SelectConfig(rule="entropy", k=1, mass=0.5, above=0.8, q=1.1)},
    "null": {"select": SelectConfig(rule="null", k=2, nulls=3), "nulls": 3, "weights": "softmax"},
    "expert_choice": {"select": SelectConfig(rule="expert_choice", k=1), "weights": "one"},
    "all": {"select": SelectConfig(rule="all", k=E)},
    "gain": {"weights": "gain"},
}
FORMS: dict[str, Onnx] = {
    "fused": Onnx(form="fused"),
    "unrolled": Onnx(form="unrolled"),
    "dense": Onnx(form="dense"),
    "int8": Onnx(form="quantised", block="row"),
    "int4": Onnx(form="quantised", quantise=4, block=16),
}


def layer_of(router: dict[str, Any], activation: str, seed: int = 0, **more: Any) -> MoE:
    """Random experts behind a router, a shared expert, a thin linear map and an output bias."""
    config = moe(activation, num_experts=E, width=WIDTH, d_model=D).config
    own = {"pointwise": ACTIVATIONS[activation], "up_bias": True, **router}
    routing = replace(config.router, **own)
    shape = {"shared": 6, "low_rank": 2} | more
    layer = MoE(replace(config, router=routing, **shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            size = 3.0 if name.startswith("router") else 1.0
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn * size / tensor.shape[-1] ** 0.5)
        if router.get("kind") == "cosine":
            layer.router.temperature.fill_(0.1)
    return layer


class Side(nn.Module):
    """Layers side by side: one file tests them all."""

    def __init__(self, layers: list[MoE]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def sample(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def export(layers: list[MoE] | Side, folder: Path, options: Onnx) -> Path:
    model = layers if isinstance(layers, Side) else Side(layers)
    path, stored = folder / "model.onnx", save(model, folder)
    return export_onnx(model, (sample(7),), path=path, stored=stored, options=options)


def rounded(layers: list[MoE], path: Path) -> list[MoE]:
    """Copies that have the experts of the file."""
    layers = copy.deepcopy(layers)
    for found in rounded_layers(path):
        experts = layers[int(found.layer.split(".")[1])].experts
        with torch.no_grad():
            experts.up_EGD.copy_(found.up_EGD)
            experts.down_proj.copy_(found.down_EDI)
    return layers


@torch.no_grad()
def reference(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """The experts, run in float64 for the tokens that the router gives them, and the rest."""
    wide = copy.deepcopy(layer).double()
    _, weights_TK, index_TK = layer.router(x_TD)
    y_TD = wide.experts.eager_forward(x_TD.double(), index_TK, weights_TK.double())
    for part in (wide.shared_expert, wide.low_rank):
        y_TD = y_TD if part is None else y_TD + part(x_TD.double())
    return y_TD if wide.output_bias is None else y_TD + wide.output_bias


def distances(path: Path, layers: list[MoE], x_TD: torch.Tensor) -> list[float]:
    """|file - layer| over the largest |layer|, of each layer."""
    made = session(path).run(None, {"x": x_TD.numpy()})
    return [
        ((torch.from_numpy(y) - expected).abs().max() / expected.abs().max()).item()
        for y, expected in zip(made, (reference(layer, x_TD) for layer in layers), strict=True)
    ]


# Every activation behind one router, and two kernels behind every other.
KERNELS = ("relu", "silu", "gelu_tanh", "swiglu")
CASES = [("linear", activation) for activation in ACTIVATIONS]
CASES += [(r, KERNELS[(i + j) % 4]) for i, r in enumerate(list(ROUTER_KINDS)[1:]) for j in (0, 2)]


@pytest.fixture(scope="module")
def side() -> Side:
    return Side([layer_of(ROUTER_KINDS[r], a, seed=i) for i, (r, a) in enumerate(CASES)])


@pytest.fixture(scope="module", params=FORMS)
def written(request, side, one_trace, tmp_path_factory) -> tuple[str, list[MoE], Path]:
    path = export(side, tmp_path_factory.mktemp(request.param), FORMS[request.param])
    return request.param, rounded(list(side.layers), path), path


@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_every_router_and_activation(written, tokens: int) -> None:
    _, layers, path = written
    found = distances(path, layers, sample(tokens, seed=tokens))
    wrong = {case: gap for case, gap in zip(CASES, found, strict=True) if not gap <= CLOSE}
    assert not wrong


def test_the_kernels_are_used_where_there_are_some(written) -> None:
    form, layers, path = written
    nodes = onnx.load(path, load_external_data=False).graph.node
    names = [node.op_type for node in nodes if node.op_type.startswith(("MoE", "QMoE"))]
    kernel = {"fused": "MoE", "int8": "QMoE", "int4": "QMoE"}.get(form)
    for (router, activation), layer, name in zip(CASES, layers, names, strict=True):
        has_one = kernel and activation not in ("gelu", "geglu")
        if router == "gain":  # 1 + g p may be negative
            has_one = has_one and bool(layer.router.gain.min() > -1)
        assert (name == kernel) == bool(has_one), (router, activation, name)


def test_a_gain_that_may_be_negative_has_no_kernel() -> None:
    layer = layer_of(ROUTER_KINDS["gain"], "relu")
    for gain, fused in ((0.5, True), (-0.9, True), (-1.0, False), (-3.0, False)):
        layer.router.gain.data.fill_(0.5)
        layer.router.gain.data[2] = gain
        assert (fused_form(routed(layer)) is not None) == fused


def test_checker_and_reference_evaluator(written) -> None:
    form, layers, path = written
    onnx.checker.check_model(path, full_check=True)
    if form in ("fused", "unrolled", "dense"):  # there is no body behind QMoE
        x_TD = sample(9, seed=3)
        made = ReferenceEvaluator(str(path)).run(None, {"x": x_TD.numpy()})
        for case, layer, y in zip(CASES, layers, made, strict=True):
            expected = reference(layer, x_TD)
            gap = (torch.from_numpy(np.asarray(y)) - expected).abs().max()
            assert gap <= CLOSE * expected.abs().max(), case


@pytest.mark.parametrize("form", FORMS)
def test_idle_experts_ties_and_tokens_that_visit_nobody(tmp_path: Path, form: str) -> None:
    one = layer_of({"bias": True}, "relu")
    ties = layer_of({"bias": True}, "relu", seed=1, shared=0, low_rank=0)
    nobody = layer_of({"bias": True, **ROUTER_KINDS["null"]}, "relu", seed=2)
    with torch.no_grad():
        one.router.bias.copy_(torch.tensor([0.0, 0, 0, 0, 900]))  # all tokens on the last two
        ties.router.weight.zero_()
        ties.router.bias.fill_(0.5)
        nobody.router.bias[E:] = 900
    layers = [one, ties, nobody]
    path = export(layers, tmp_path, FORMS[form])
    x_TD = sample(9)
    assert (one.router(x_TD)[2] == 4).any(-1).all()
    assert not nobody.router(x_TD)[1].any()
    as_written = rounded(layers, path)
    first, _, last = distances(path, as_written, x_TD)
    assert max(first, last) <= CLOSE
    made = torch.from_numpy(session(path).run(None, {"x": x_TD.numpy()})[1])
    expected = exact(as_written[1], x_TD)  # of equal scores the lowest expert wins
    assert (made - expected).abs().max() <= CLOSE * expected.abs().max()


@settings(max_examples=6, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    activation=st.sampled_from(["relu", "swiglu", "gelu_tanh"]),
    experts=st.integers(1, 7),
    width=st.integers(1, 20),
    d_model=st.integers(1, 20),
    tokens=st.integers(1, 30),
    bias=st.booleans(),
    data=st.data(),
)
def test_any_shape(
    tmp_path_factory, form, activation, experts, width, d_model, tokens, bias, data
) -> None:
    layer = moe(
        activation,
        bias=bias,
        num_experts=experts,
        top_k=data.draw(st.integers(1, experts)),
        width=width,
        d_model=d_model,
    ).eval()
    folder = tmp_path_factory.mktemp("any")
    x_TD = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(tokens))
    stored = save(layer, folder)
    path = export_onnx(
        layer,
        (torch.randn(3, d_model),),
        path=folder / "model.onnx",
        stored=stored,
        options=FORMS[form],
    )
    for found in rounded_layers(path):
        with torch.no_grad():
            layer.experts.up_EGD.copy_(found.up_EGD)
            layer.experts.down_proj.copy_(found.down_EDI)
    (y,) = session(path).run(None, {"x": x_TD.numpy()})
    expected = reference(layer, x_TD)
    gap = (torch.from_numpy(y) - expected).abs().max()
    assert gap <= CLOSE * max(expected.abs().max().item(), 1e-3)


# Rounding


@pytest.mark.parametrize("block", ["row", "adaptive", 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_what_independent_errors_give(tmp_path: Path, bits: int, block: Any) -> None:
    layers = [
        layer_of({}, a, seed=i, shared=0, low_rank=0) for i, a in enumerate(("relu", "swiglu"))
    ]
    options = Onnx(form="quantised", quantise=bits, block=block)  # type: ignore[arg-type]
    path = export(layers, tmp_path, options)
    named = {f"layers.{i}": layer.experts for i, layer in enumerate(layers)}
    rows, checks = verify_rounding(path, named, {"x": sample(200).numpy()})
    assert all(found.passed for found in checks), checks
    assert [row.path for row in rows] == list(named)
    for row in rows:
        assert row.rounding_over_expected > 0.5  # so a tenth of the errors would be noticed, too
        low, high = (0.003, 0.05) if bits == 8 else (0.05, 0.4)
        assert low < row.output_rms < high


def test_a_wrong_scale_is_noticed(tmp_path: Path) -> None:
    layers = [layer_of({}, "relu", shared=0, low_rank=0)]
    path = export(layers, tmp_path, FORMS["int8"])
    model = onnx.load(path)
    (scale,) = [t for t in model.graph.initializer if t.name.endswith("up_proj.int8.scale")]
    wrong = onnx.numpy_helper.to_array(scale) * np.float32(1.1)
    scale.CopyFrom(onnx.numpy_helper.from_array(wrong, scale.name))
    onnx.save(model, path)
    feeds = {"x": sample(50).numpy()}
    _, checks = verify_rounding(path, {"layers.0": layers[0].experts}, feeds)
    assert [found.passed for found in checks] == [False, True, True]


def test_experts_by_hand() -> None:
    layer = layer_of({}, "swiglu")
    x_TD = sample(11)
    _, weights_TK, index_TK = layer.router(x_TD)
    weights_TE = torch.zeros(11, E).scatter(1, index_TK, weights_TK)
    experts = layer.experts
    with torch.no_grad():
        got = weighted_sum(
            ACTIVATIONS["swiglu"],
            *(experts.up_EGD, experts.up_bias_EG, experts.down_proj, x_TD, weights_TE),
        )
        expected = experts.eager_forward(x_TD, index_TK, weights_TK)
    # Sums of 16, 12 and 2 products after each other, whose magnitudes add up to less than 5.
    torch.testing.assert_close(got, expected, rtol=0, atol=5 * (16 + 12 + 2) * 2**-24)


def test_odd_widths_stay_unrolled_in_four_bits() -> None:
    odd = moe("relu", width=11)
    assert choose(routed(odd), Onnx(form="quantised", quantise=4)) == Choice(
        "unrolled", odd.experts.act_fn.pointwise, bits=8
    )
    assert choose(routed(odd), Onnx(form="quantised", quantise=8)).form == "quantised"


# Narrow types


@pytest.mark.parametrize("form", ["fused", "unrolled", "dense", "quantised"])
def test_float16(tmp_path: Path, form: Any) -> None:
    layers = [layer_of({}, a, seed=i) for i, a in enumerate(("relu", "swiglu", "gelu"))]
    path = export(layers, tmp_path, Onnx(form=form, dtype="float16", block="row"))
    onnx.checker.check_model(path, full_check=True)
    kinds = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    experts = [kind for name, kind in kinds.items() if "experts" in name]
    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    assert set(experts) <= narrow, kinds
    x_TD = sample(30).half()
    made = session(path).run(None, {"x": x_TD.numpy()})
    for y, layer in zip(made, rounded(layers, path), strict=True):
        assert y.dtype == np.float16
        expected = reference(layer, x_TD.float())
        gap = (torch.from_numpy(y) - expected).abs().max()
        # Weights, hidden and output are rounded to 11 bits: a few of 2^-11 each, sums of 12 terms.
        assert gap <= 12 * 2**-11 * expected.abs().max()


@pytest.mark.parametrize("form", ["fused", "unrolled", "dense"])
def test_bfloat16_passes_the_checker(tmp_path: Path, form: Any) -> None:
    path = export([layer_of({}, "swiglu")], tmp_path, Onnx(form=form, dtype="bfloat16"))
    onnx.checker.check_model(path, full_check=True)
    assert onnx.load(path).graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    kernel = {"fused": "MoE"}.get(form, "Gemm")
    with pytest.raises(Exception, match=f"NOT_IMPLEMENTED.*implementation for {kernel}"):
        session(path)  # the day it runs, such files can be verified


# Which form


def test_profiles() -> None:
    layer, erf = moe("silu"), moe("gelu")
    assert choose(routed(layer), Onnx(profile="portable")).form == "unrolled"
    assert choose(routed(layer), Onnx(profile="cuda")).form == "fused"
    assert choose(routed(layer), Onnx(profile="cuda", quantise=8)).form == "quantised"
    assert choose(routed(layer), Onnx(profile="portable", form="fused")).form == "fused"
    assert choose(routed(erf), Onnx(profile="cuda")).form == "unrolled"
    assert choose(routed(erf), Onnx(profile="cuda", gelu="tanh")).form == "fused"
    assert Onnx(profile="cuda").half == "float16"
    assert Onnx(profile="cuda", dtype="float32").half is None


@pytest.mark.parametrize(
    ("experts", "width", "k", "tokens", "form"),
    [
        (64, 24, 8, 1, "fused"),  # many small experts: the overhead of each decides
        (16, 96, 4, 1, "fused"),
        (4, 384, 1, 1024, "unrolled"),  # long inputs: products of matrices decide
        (16, 256, 4, 1024, "unrolled"),
    ],
)
def test_the_cost_model_names_the_form_that_was_faster(experts, width, k, tokens, form) -> None:
    layer = moe("silu", num_experts=experts, width=width, top_k=k, d_model=384)
    assert choose(routed(layer), Onnx(tokens=tokens)).form == form


def test_costs_grow_with_the_work() -> None:
    small = Work(tokens=16, num_experts=16, top_k=4, d_model=384, width=96)
    for kind in NANOSECONDS:
        for more in ({"tokens": 64}, {"width": 384}, {"d_model": 1024}):
            assert seconds(kind, Work(**{**vars(small), **more})) > seconds(kind, small)


def test_portable_files_have_standard_operations_alone(tmp_path: Path) -> None:
    path = export([layer_of({}, "silu")], tmp_path, Onnx(profile="portable"))
    model = onnx.load(path, load_external_data=False)
    assert {o.domain for o in model.opset_import} == {"", "upcycle"}
    known = {(f.domain, f.name) for f in model.functions}
    for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
        assert not node.domain or (node.domain, node.op_type) in known


@pytest.mark.parametrize(("version", "told"), [("1.27.1", True), ("1.28.0", False), (None, False)])
def test_an_old_kernel_for_cuda_is_told_of(
    version: str | None, told: bool, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    name = "upcycle.targets.onnx.forms.lower.installed_version"
    monkeypatch.setattr(name, lambda package: version)
    model = nn.Sequential(moe("swiglu", bias=False))
    options = Onnx(profile="cuda", dtype="float32")
    export_onnx(model, (torch.randn(2, 16),), path=tmp_path / "m.onnx", stored={}, options=options)
    assert ("before 1.28 its kernel for CUDA" in caplog.text) is told
