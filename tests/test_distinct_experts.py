"""Distinct experts against a loop over tokens.

Copies alone would not notice a layer that mixes up experts or weights.
"""

import dataclasses
import math

import numerics
import pytest
import torch

from upcycle.ir.ffn import Located
from upcycle.ir.weights import ExpertWeights, FFNWeights, MoEWeights
from upcycle.layers.config import WeightRule
from upcycle.layers.moe import MoE
from upcycle.passes.plan.plan import make_plan

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOKENS = 33


def distinct(
    name: str, rule: WeightRule, dtype: torch.dtype, *, bias: bool, d_out: int
) -> tuple[list[FFNWeights], MoE]:
    """Four unrelated experts of 8 neurons, a router with bias, and the layer of them; top 2."""
    ffns = [
        numerics.random_ffn(name, d_ff=8, d_out=d_out, bias=bias, dtype=dtype, seed=seed)
        for seed in range(10, 14)
    ]
    hoisted = ffns[0].down_bias_O
    ffns = [dataclasses.replace(ffn, down_bias_O=None) for ffn in ffns]
    router = {
        "weight": numerics.random_tokens(4, 16, torch.float32, seed=2) / 4,
        "bias": numerics.random_tokens(1, 4, torch.float32, seed=3)[0] / 4,
    }
    experts = ExpertWeights(
        up_EGD=torch.stack([ffn.up_MFD.flatten(0, 1) for ffn in ffns]),
        up_bias_EG=torch.stack(
            [ffn.up_bias_MF.flatten() for ffn in ffns if ffn.up_bias_MF is not None]
        )
        if bias
        else None,
        down_EOI=torch.stack([ffn.down_OF for ffn in ffns]),
        neuron_EI=torch.arange(32).reshape(4, 8),
    )
    recipe = numerics.make_recipe(
        {"method": "contiguous", "count": 4},
        {"method": "normal", "top_k": 2, "weights": rule, "bias": True, "scale": 1.5},
    )
    whole = numerics.random_ffn(name, d_ff=32, d_out=d_out, bias=bias, dtype=dtype)
    (spec,) = make_plan(Located(ffns=(numerics.site(whole),)), recipe).specs
    layer = numerics.run_layer(spec, MoEWeights(experts, router, hoisted))
    return [*ffns, dataclasses.replace(ffns[0], down_bias_O=hoisted)], router, layer


def naive(
    ffns: list[FFNWeights], router: dict[str, torch.Tensor], rule: WeightRule, x_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, in float64 and Python: the outputs [T, O] and the weights [T, E]."""
    *experts, with_bias = ffns
    rows, weights = [], []
    for x_D in x_TD.double():
        logits = [
            math.fsum((row_D.double() * x_D).tolist()) + bias
            for row_D, bias in zip(router["weight"], router["bias"].double().tolist(), strict=True)
        ]
        odds = [math.exp(logit) for logit in logits]
        chosen = sorted(range(4), key=lambda e: -odds[e])[:2]
        among = {"softmax": sum(odds), "one": None}.get(rule, sum(odds[e] for e in chosen))
        weight = [0.0] * 4
        for e in chosen:
            weight[e] = 1.5 * (1.0 if among is None else odds[e] / among)
        y_O = torch.zeros(len(with_bias.down_OF)).double()
        if with_bias.down_bias_O is not None:
            y_O = y_O + with_bias.down_bias_O.double()
        for e in chosen:
            ffn = experts[e].to(torch.float64)
            z = [up_FD @ x_D for up_FD in ffn.up_MFD]
            if ffn.up_bias_MF is not None:
                z = [z_F + bias_F for z_F, bias_F in zip(z, ffn.up_bias_MF, strict=True)]
            y_O = y_O + weight[e] * (ffn.down_OF @ ffn.pointwise(*z))
        rows.append(y_O)
        weights.append(torch.tensor(weight).double())
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("d_out", [16, 24], ids=["square", "wide"])
@pytest.mark.parametrize("rule", ["renormalised", "softmax", "one", "renorm_detach"])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_distinct_experts_agree_with_a_loop_over_tokens(
    name: str, rule: WeightRule, d_out: int, bias: bool, dtype: torch.dtype
) -> None:
    ffns, router, layer = distinct(name, rule, dtype, bias=bias, d_out=d_out)
    x_TD = numerics.random_tokens(TOKENS, 16, dtype)
    expected_TO, weights_TE = naive(ffns, router, rule, x_TD)
    assert (weights_TE.sum(0) > 0).all(), "every expert is used"
    # The last FFN is the first with the output bias; its weight of zero leaves the bias alone.
    bound_TO = numerics.bound(ffns[:-1], x_TD, dtype, weights_TN=weights_TE, experts=3)
    if bias:
        assert ffns[-1].down_bias_O is not None
        bound_TO += numerics.LAMBDA * torch.finfo(dtype).eps * ffns[-1].down_bias_O.abs()
    with torch.no_grad():
        numerics.assert_equal_up_to_rounding(layer(x_TD), expected_TO, bound_TO)
        _, weights_TK, index_TK = layer.router(x_TD)
        masked_TO = layer.experts.masked_forward(x_TD, index_TK, weights_TK)
        if layer.output_bias is not None:
            masked_TO = masked_TO + layer.output_bias
        numerics.assert_equal_up_to_rounding(masked_TO, expected_TO, bound_TO)
        layer.experts.down_proj.copy_(layer.experts.down_proj.roll(1, 0))
        with pytest.raises(AssertionError, match="rounding explains"):
            numerics.assert_equal_up_to_rounding(layer(x_TD), expected_TO, bound_TO)
