"""Every promise of equality with the dense FFN, through the layer that runs; and its limits."""

import dataclasses

import numerics
import pytest
import torch

from upcycle.errors import PlanError, UnsupportedError, UsageError
from upcycle.ir.ffn import Located
from upcycle.ir.layer_weights import load_weights
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights
from upcycle.layers.config import WeightRule
from upcycle.layers.moe import MoE, all_experts
from upcycle.passes.merge import merge_to_dense
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.transform.transform import transform
from upcycle.recipe.schema import Recipe

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]
TOKENS = 33


def copies(weights: WeightRule, top_k: int, scale: float = 1.0) -> Recipe:
    return numerics.make_recipe(
        {"method": "copy", "count": 4},
        {"method": "normal", "top_k": top_k, "weights": weights, "scale": scale, "std": 0.2},
    )


def granular(
    weights: WeightRule, top_k: int, scale: str = "down", method: str = "virtual_group"
) -> Recipe:
    """E = 3 copies of G = 4 slices."""
    return numerics.make_recipe(
        {"method": "granular", "count": 3, "granularity": 4, "scale": scale},
        {"method": method, "top_k": top_k, "weights": weights, "std": 0.2, "bias": True},
    )


def split(method: str, count: int, router: str, top_k: int | str = "all", **more: object) -> Recipe:
    return numerics.make_recipe(
        {"method": method, "count": count},
        {"method": router, "top_k": top_k, "weights": "one", **more},
    )


EXACT = {
    "copies-renormalised-2": copies("renormalised", 2),
    "copies-renormalised-1": copies("renormalised", 1),
    "copies-renorm_detach-3": copies("renorm_detach", 3),
    "copies-one-1": copies("one", 1),
    "copies-one-2-halved": copies("one", 2, scale=0.5),
    "copies-softmax-all": copies("softmax", 4),
    "granular-renormalised-4": granular("renormalised", 4),
    "granular-renormalised-8": granular("renormalised", 8),
    "granular-renorm_detach-4": granular("renorm_detach", 4),
    "granular-one-4": granular("one", 4),  # Dynamic-DINO
    "granular-one-8": granular("one", 8),
    "granular-one-all-any-router": granular("one", 12, method="normal"),
    "granular-softmax-all": granular("softmax", 12),
    "contiguous": split("contiguous", 4, "normal"),
    "contiguous-padded": split("contiguous", 5, "centroid"),
    "random-padded": split("random", 7, "avg_key", tied=True),
    "cluster": split("cluster", 6, "centroid"),
    "cluster-padded": split("cluster", 5, "avg_key"),
}

PLACEMENTS = [
    *(("up_down", name) for name in ("relu", "relu2", "swiglu", "geglu", "reglu", "bilinear")),
    *(("even", name) for name in ("relu", "relu2", "reglu", "bilinear")),
]


def check(
    layer: MoE, ffn: FFNWeights, *, terms: int, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Hold the layer against the dense FFN in float64, from the same rounded weights."""
    dtype = ffn.down_OF.dtype
    x_TD = numerics.random_tokens(TOKENS, 16, dtype) if tokens is None else tokens
    with torch.no_grad():
        y_TO: torch.Tensor = layer(x_TD)
    assert y_TO.dtype == dtype
    expected_TO = ffn.to(torch.float64)(x_TD.double())
    bound_TO = numerics.bound([ffn], x_TD, dtype, experts=terms)
    numerics.assert_equal_up_to_rounding(y_TO, expected_TO, bound_TO)
    return y_TO


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("case", EXACT)
def test_exact_methods_keep_the_function(
    case: str, name: str, bias: bool, dtype: torch.dtype
) -> None:
    ffn = numerics.random_ffn(name, bias=bias, dtype=dtype)
    spec, _, layer = numerics.convert(ffn, EXACT[case])
    assert spec.promise == "exact"
    check(layer, ffn, terms=spec.top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("scale", "name"), PLACEMENTS)
def test_exact_placements_keep_the_function(
    scale: str, name: str, bias: bool, dtype: torch.dtype
) -> None:
    ffn = numerics.random_ffn(name, bias=bias, dtype=dtype)
    spec, _, layer = numerics.convert(ffn, granular("renormalised", 8, scale))
    assert spec.promise == "exact"
    check(layer, ffn, terms=spec.top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("method", ["contiguous", "random", "cluster"])
def test_a_split_is_exact_once_all_experts_run(method: str, name: str, dtype: torch.dtype) -> None:
    ffn = numerics.random_ffn(name, dtype=dtype)
    spec, _, layer = numerics.convert(ffn, split(method, 5, "avg_key", 2))
    assert spec.promise == "exact with all experts"
    with pytest.raises(AssertionError):
        check(layer, ffn, terms=2)
    with all_experts(layer):
        check(layer, ffn, terms=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param("gelu", granular("renormalised", 4, "even"), id="even-gelu"),
        pytest.param("swiglu", granular("renormalised", 4, "even"), id="even-swiglu"),
        pytest.param("swiglu", copies("softmax", 2), id="softmax-on-copies"),
        pytest.param("swiglu", copies("renormalised", 2, scale=2.0), id="scaled-copies"),
        pytest.param("swiglu", copies("one", 2), id="weights-one-on-two-copies"),
        pytest.param("swiglu", granular("softmax", 4), id="softmax-on-slices"),
        pytest.param(
            "swiglu", granular("renormalised", 4, method="normal"), id="independent-router-rows"
        ),
        pytest.param("gelu", split("cluster", 4, "centroid", 3), id="not-all-of-a-split"),
    ],
)
def test_the_check_fails_where_nothing_is_promised(
    name: str, recipe: Recipe, dtype: torch.dtype
) -> None:
    ffn = numerics.random_ffn(name, dtype=dtype)
    spec, _, layer = numerics.convert(ffn, recipe)
    assert spec.promise != "exact"
    with pytest.raises(AssertionError, match="rounding explains"):
        check(layer, ffn, terms=spec.top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_without_their_factor_fail_the_check(dtype: torch.dtype) -> None:
    ffn = numerics.random_ffn("swiglu", dtype=dtype)
    spec, weights, layer = numerics.convert(ffn, granular("renormalised", 4))
    assert weights.experts.down_scale == 4
    with torch.no_grad():
        layer.experts.down_proj.div_(4)
    with pytest.raises(AssertionError, match="rounding explains"):
        check(layer, ffn, terms=spec.top_k)


def test_a_part_of_a_copy_is_refused_and_would_be_wrong() -> None:
    ffn = numerics.random_ffn("gelu")
    with pytest.raises(PlanError, match="multiple of 4"):
        numerics.convert(ffn, granular("renormalised", 6))
    spec, weights, _ = numerics.convert(ffn, granular("renormalised", 4))
    layer = numerics.run_layer(dataclasses.replace(spec, top_k=6), weights)
    with pytest.raises(AssertionError, match="rounding explains"):
        check(layer, ffn, terms=6)


@pytest.mark.parametrize("std", [1e-6, 1e-3])
def test_softmax_on_slices_becomes_exact_as_the_router_vanishes(std: float) -> None:
    # The chosen weights sum to T / (E G) times (1 + a few logits), and a logit is about 4 std.
    ffn = numerics.random_ffn("swiglu")
    recipe = numerics.make_recipe(
        {"method": "granular", "count": 3, "granularity": 4},
        {"method": "virtual_group", "top_k": 4, "weights": "softmax", "std": std},
    )
    x_TD = numerics.random_tokens(TOKENS, 16, torch.float64)
    _, _, layer = numerics.convert(ffn, recipe)
    error = (layer(x_TD) - ffn(x_TD)).norm() / ffn(x_TD).norm()
    assert std / 10 < error < 20 * std


@pytest.mark.parametrize("top_k", [4, 8])
def test_every_token_visits_each_slice_equally_often(top_k: int) -> None:
    ffn = numerics.random_ffn("swiglu", dtype=torch.float32)
    _, _, layer = numerics.convert(ffn, granular("renormalised", top_k))
    _, _, index_TK = layer.router(numerics.random_tokens(512, 16, torch.float32))
    visits_TG = torch.nn.functional.one_hot(index_TK % 4).sum(1)
    assert (visits_TG == top_k // 4).all()
    copies_TE = torch.nn.functional.one_hot(index_TK // 4, 3).sum(1)
    assert ((copies_TE == 0) | (copies_TE == 4)).all()


# Gradients at the first step.


def router_gradient(weights: WeightRule, top_k: int) -> float:
    ffn = numerics.random_ffn("gelu")
    _, _, layer = numerics.convert(ffn, copies(weights, top_k))
    layer(numerics.random_tokens(TOKENS, 16, torch.float64)).square().mean().backward()
    assert isinstance(layer.router.weight.grad, torch.Tensor)
    return float(layer.router.weight.grad.abs().max())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_copies_give_the_router_a_gradient_only_without_the_sum(top_k: int) -> None:
    assert router_gradient("renormalised", top_k) < 1e-14
    assert router_gradient("renorm_detach", top_k) > 1e-3
    assert router_gradient("softmax", top_k) > 1e-3


# Back to dense; loading; draws.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["contiguous", "random", "cluster"])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_merging_a_split_gives_the_dense_bits_back(
    name: str, method: str, dtype: torch.dtype
) -> None:
    ffn = numerics.random_ffn(name, dtype=dtype)
    _, weights, _ = numerics.convert(ffn, split(method, 5, "normal"))
    merged = merge_to_dense(weights.experts, ffn)
    assert merged.up_bias_MF is not None
    assert ffn.up_bias_MF is not None
    assert torch.equal(merged.up_MFD, ffn.up_MFD)
    assert torch.equal(merged.up_bias_MF, ffn.up_bias_MF)
    assert torch.equal(merged.down_OF, ffn.down_OF)


def test_copies_cannot_be_merged() -> None:
    ffn = numerics.random_ffn("gelu")
    for recipe in (copies("one", 1), granular("one", 4)):
        with pytest.raises(UnsupportedError, match="cannot be merged"):
            merge_to_dense(numerics.convert(ffn, recipe)[1].experts, ffn)


def test_weights_of_another_layer_are_refused() -> None:
    ffn = numerics.random_ffn("gelu")
    spec, _, _ = numerics.convert(ffn, copies("renormalised", 2))
    _, other, _ = numerics.convert(ffn, split("random", 4, "normal"))
    with pytest.raises(UsageError, match=r"experts\.up_proj is \(4, 48, 16\) in the layer"):
        load_weights(MoE(spec.layer_config()), other)


def test_layers_draw_differently_and_the_same_seed_gives_the_same_bytes() -> None:
    ffn = numerics.random_ffn("swiglu")

    def run(seed: int) -> list[tuple[MoESpec, MoEWeights]]:
        recipe = split("random", 4, "normal").model_copy(update={"seed": seed})
        located = Located(ffns=tuple(numerics.site(ffn, f"layers.{i}.mlp") for i in range(2)))
        return [(spec, transform(ffn, spec)) for spec in make_plan(located, recipe).specs]

    (first, a), (second, b) = run(0)
    assert first.seed != second.seed
    assert not torch.equal(a.router["weight"], b.router["weight"])
    assert not torch.equal(a.experts.neuron_EI, b.experts.neuron_EI)
    for (_, one), (_, again), (_, other) in zip(run(0), run(0), run(1), strict=True):
        assert one.router["weight"].numpy().tobytes() == again.router["weight"].numpy().tobytes()
        assert one.experts.up_EGD.numpy().tobytes() == again.experts.up_EGD.numpy().tobytes()
        assert not torch.equal(one.router["weight"], other.router["weight"])
        assert not torch.equal(one.experts.neuron_EI, other.experts.neuron_EI)
