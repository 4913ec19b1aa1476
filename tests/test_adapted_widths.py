"""Widths that follow the importance of neurons: the sum stays, and the better layer gets more."""

import dataclasses

import numerics
import pytest
import torch

from upcycle.errors import PlanError
from upcycle.ir.ffn import Located
from upcycle.ir.spec import MoESpec
from upcycle.passes.plan.adaptive_sizes import adaptive_widths
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.recipe.schema import Recipe

ROUTER = {"method": "ridge", "top_k": 1, "weights": "one", "bias": True}


def recipe(**experts: object) -> Recipe:
    given = {"method": "token_sets", "count": 4, "width": 0.25, "adaptive": True} | experts
    return numerics.make_recipe(given, ROUTER)


def specs(count: int, d_ff: int = 256) -> tuple[MoESpec, ...]:
    ffn = numerics.random_ffn("swiglu", d_ff=d_ff)
    sites = tuple(numerics.site(ffn, f"layers.{i}.mlp") for i in range(count))
    return make_plan(Located(ffns=sites), recipe()).specs


def test_the_sum_stays_and_the_better_layer_gets_more() -> None:
    planned = specs(3)
    scores = {
        spec.ffn.path: scale * torch.rand(256, generator=torch.Generator().manual_seed(i))
        for i, (spec, scale) in enumerate(zip(planned, (1.0, 2.0, 0.5), strict=True))
    }
    widths = [spec.width for spec in adaptive_widths(planned, scores)]
    assert sum(widths) == sum(spec.width for spec in planned) == 3 * 64
    assert widths[1] > widths[0] > widths[2] >= 8
    assert all(width % 8 == 0 for width in widths)


def test_equal_layers_stay_as_planned() -> None:
    planned = specs(2)
    score_F = torch.arange(256.0)
    adapted = adaptive_widths(planned, {spec.ffn.path: score_F for spec in planned})
    assert [spec.width for spec in adapted] == [64, 64]


def test_no_layer_is_wider_than_dense_or_empty() -> None:
    planned = [dataclasses.replace(spec, width=240) for spec in specs(2)]
    scores = dict(
        zip(("layers.0.mlp", "layers.1.mlp"), (torch.ones(256), torch.zeros(256)), strict=True)
    )
    widths = [spec.width for spec in adaptive_widths(tuple(planned), scores)]
    assert widths == [256, 224]


def test_it_needs_gradients_and_a_width() -> None:
    assert needs(recipe()) == {"activations", "gradients"}
    assert "gradients" not in needs(recipe(adaptive=False))
    site = numerics.site(numerics.random_ffn("gelu"))
    with pytest.raises(PlanError, match=r"set `experts\.width`"):
        make_plan(Located(ffns=(site,)), recipe(width=None))
