"""Routers: their rows, their dtype, and what they are zero or equal to."""

import dataclasses
import re

import numerics
import pytest
import torch

from upcycle.ir.ffn import Located
from upcycle.passes.experts.cluster import features_of
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.passes.transform.transform import transform

SPLIT = {"method": "cluster", "count": 7}  # 48 neurons: widths 7 and 6, so there is padding


def router(method: str, **more: object) -> dict[str, object]:
    return {"method": method, "top_k": 2, "weights": "one", **more}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_avg_key_is_what_the_layer_recomputes(name: str, dtype: torch.dtype) -> None:
    ffn = numerics.random_ffn(name, dtype=dtype)
    _, weights, layer = numerics.convert(ffn, numerics.make_recipe(SPLIT, router("avg_key")))
    layer.router.float()
    loaded = layer.router.weight.clone()
    assert torch.equal(loaded, weights.router["weight"])
    layer.tie_router()
    assert torch.equal(layer.router.weight, loaded)


def test_avg_key_logit_is_the_mean_pre_activation() -> None:
    ffn = numerics.random_ffn("swiglu", bias=False)
    _, weights, layer = numerics.convert(ffn, numerics.make_recipe(SPLIT, router("avg_key")))
    x_TD = numerics.random_tokens(9, 16, torch.float64)
    z_TF = x_TD @ ffn.up_MFD[0].t()
    logits_TE, _, _ = layer.router(x_TD)
    for e, neurons in enumerate(weights.experts.neuron_EI.tolist()):
        mean_T = z_TF[:, [n for n in neurons if n >= 0]].mean(1)
        # Rows were rounded to float32: 16 products, each off by 2^-24 of about one.
        torch.testing.assert_close(logits_TE[:, e], mean_T, rtol=0, atol=16 * 2**-24)


@pytest.mark.parametrize("method", ["avg_key", "centroid"])
def test_weights_on_the_meta_device_become_a_router_there(method: str) -> None:
    ffn = numerics.random_ffn("swiglu")
    there = dataclasses.replace(
        ffn,
        up_MFD=ffn.up_MFD.to("meta"),
        up_bias_MF=None,
        down_OF=ffn.down_OF.to("meta"),
        down_bias_O=None,
    )
    experts = {"method": "contiguous", "count": 7}
    recipe = numerics.make_recipe(experts, router(method))
    (spec,) = make_plan(Located(ffns=(numerics.site(there),)), recipe).specs
    weight_ED = transform(there, spec).router["weight"]
    assert (weight_ED.device.type, weight_ED.shape) == ("meta", (7, 16))


def test_a_tied_router_follows_the_experts() -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    recipe = numerics.make_recipe(SPLIT, router("avg_key", tied=True))
    _, weights, layer = numerics.convert(ffn, recipe)
    assert "router.weight" not in dict(layer.named_parameters())
    with torch.no_grad():
        layer.experts.up_EGD.mul_(2)
    layer.train()(numerics.random_tokens(3, 16, torch.float32))
    assert torch.equal(layer.router.weight, 2 * weights.router["weight"])


def test_centroid_is_the_mean_of_unit_keys() -> None:
    ffn = numerics.random_ffn("swiglu")
    _, weights, _ = numerics.convert(ffn, numerics.make_recipe(SPLIT, router("centroid")))
    key_FD = features_of(ffn, "gate")
    for row_D, neurons in zip(
        weights.router["weight"], weights.experts.neuron_EI.tolist(), strict=True
    ):
        mean_D = key_FD[[n for n in neurons if n >= 0]].mean(0)
        # Seven numbers up to one: six sums up to 7, and a division by 7, each off by 2^-24.
        torch.testing.assert_close(row_D, mean_D, rtol=0, atol=7 * 2**-24)


def test_virtual_groups_share_a_row() -> None:
    ffn = numerics.random_ffn("gelu")
    experts = {"method": "granular", "count": 3, "granularity": 4}
    recipe = numerics.make_recipe(experts, {**router("virtual_group"), "top_k": 4})
    weight_ED = numerics.convert(ffn, recipe)[1].router["weight"]
    rows_EGD = weight_ED.reshape(3, 4, -1)
    assert (rows_EGD == rows_EGD[:, :1]).all()
    assert len(set(map(tuple, rows_EGD[:, 0].tolist()))) == 3


def test_normal_has_the_standard_deviation_asked_for() -> None:
    ffn = numerics.random_ffn("gelu", d_model=512, d_ff=16)
    experts = {"method": "copy", "count": 32}
    recipe = numerics.make_recipe(experts, router("normal", std=0.05))
    weight_ED = numerics.convert(ffn, recipe)[1].router["weight"]
    # The standard deviation of n = 16384 draws is off by 1 / sqrt(2 n) = 0.6 %; five of those.
    assert abs(float(weight_ED.std()) / 0.05 - 1) < 0.03
    assert len(set(map(tuple, weight_ED.tolist()))) == 32


BLIND = ("normal", "zero", "uniform", "virtual_group", "avg_key", "centroid", "noisy_topk")


@pytest.mark.parametrize("method", BLIND)
@pytest.mark.parametrize("bias", [True, False])
def test_routers_are_float32_and_biases_start_at_zero(method: str, bias: bool) -> None:
    slices = method == "virtual_group"
    experts = {"method": "granular", "count": 2, "granularity": 2} if slices else SPLIT
    ffn = numerics.random_ffn("gelu", dtype=torch.bfloat16)
    _, weights, _ = numerics.convert(ffn, numerics.make_recipe(experts, router(method, bias=bias)))
    assert weights.router["weight"].dtype == torch.float32
    if bias:
        assert weights.router.get("bias") is not None
        assert torch.equal(weights.router.get("bias"), torch.zeros(len(weights.router["weight"])))
    else:
        assert weights.router.get("bias") is None


def test_building_does_not_touch_the_dense_weights_or_the_global_generator() -> None:
    ffn = numerics.random_ffn("swiglu")
    before = dataclasses.replace(ffn, up_MFD=ffn.up_MFD.clone(), down_OF=ffn.down_OF.clone())
    state = torch.get_rng_state()
    for method in ("normal", "avg_key", "centroid"):
        numerics.convert(ffn, numerics.make_recipe(SPLIT, router(method)))
    assert torch.equal(ffn.up_MFD, before.up_MFD)
    assert torch.equal(ffn.down_OF, before.down_OF)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_gate_names_its_paper() -> None:
    for name, gate in ROUTER_METHODS.items():
        assert gate.name == name
        assert re.search(r"Source:\n[^:]*https://", gate.build.__doc__ or "")
