"""Compensation: exact where it can be, the least-squares optimum elsewhere, and never worse."""

import dataclasses
from collections.abc import Mapping

import numerics
import pytest
import torch

from upcycle.errors import PlanError
from upcycle.ir.ffn import Located
from upcycle.passes.calibrate.usage import routed_tokens
from upcycle.passes.experts.split import membership
from upcycle.passes.plan.costs import costs
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.transform.least_squares import Sums, input_basis, solve
from upcycle.passes.transform.transform import transform
from upcycle.recipe.schema import Compensate, Recipe, Router

SPLIT = {"method": "random", "count": 6, "shared": 1, "shared_by": "contribution"}
ROUTER = {"method": "normal", "top_k": 2, "weights": "one", "std": 0.3}


def recipe(compensate: dict[str, object], experts: dict[str, object] = SPLIT) -> Recipe:
    given = {"ridge": (1e-6,), **compensate}
    return Recipe.model_validate(
        numerics.make_recipe(experts, ROUTER).model_dump() | {"compensate": given}
    )


def error(name: str, compensate: dict[str, object]) -> float:
    """The weighted square error on the calibration tokens, relative to that of no output."""
    ffn = numerics.random_ffn(name, dtype=torch.float32)
    _, _, layer = numerics.convert(ffn, recipe(compensate))
    x_TD = torch.cat(list(numerics.seen(ffn).chunks()))
    y_TO = ffn(x_TD) - ffn.down_bias_O
    weight_T1 = 1 / (y_TO.square().sum(1) + y_TO.square().sum(1).median())[:, None]
    with torch.no_grad():
        gap_TO = layer.tokens(x_TD) - ffn(x_TD)
    return float((weight_T1 * gap_TO**2).sum() / (weight_T1 * y_TO**2).sum())


PARTS: list[dict[str, object]] = [
    {"scale": True},
    {"affine": True},
    {"mean": True},
    {"low_rank": 4},
    {"refit": True},
    {"refit": True, "low_rank": 4, "mean": True},
    {"refit": True, "low_rank": 4, "mean": True, "affine": True},
]


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_each_part_helps_on_what_it_was_fitted_to(name: str, part: dict[str, object]) -> None:
    before, after = error(name, {}), error(name, part)
    # One factor for everything may be near 1 already; float32 sums of 512 tokens are off by 1e-5.
    assert after < before * (1 + 1e-5 if part == {"scale": True} else 1 - 1e-3)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_more_parts_are_never_worse(name: str) -> None:
    chain = [{}, {"mean": True}, {"mean": True, "low_rank": 4}, {"mean": True, "low_rank": 8}]
    chain.append({"mean": True, "low_rank": 8, "refit": True})
    errors = [error(name, part) for part in chain]
    assert errors == sorted(errors, reverse=True)


def test_all_experts_need_no_compensation() -> None:
    """With K = N nothing is dropped, so the fit has nothing to do: only rounding is left."""
    ffn = numerics.random_ffn("swiglu", dtype=torch.float32)
    made = recipe({"refit": True, "mean": True, "low_rank": 4})
    made = made.model_copy(update={"router": made.router.model_copy(update={"top_k": "all"})})
    _, _, layer = numerics.convert(ffn, made)
    x_TD = numerics.random_tokens(9, 16, torch.float32)
    bound = numerics.bound([ffn], x_TD, torch.float32, experts=8)
    # The sums of the fit are of 512 tokens and 65 predictors, each rounded: that much larger.
    with torch.no_grad():
        y_TO = layer.tokens(x_TD)
    numerics.assert_equal_up_to_rounding(y_TO, ffn(x_TD), 512 * bound)


def test_what_is_dropped_and_constant_is_put_back() -> None:
    """Neurons with zero rows are constant: the offset is their whole contribution."""
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    ffn.up_MFD.zero_()
    _, _, layer = numerics.convert(ffn, recipe({"mean": True}, {"method": "random", "count": 6}))
    none = recipe({}, {"method": "random", "count": 6})
    _, _, without = numerics.convert(ffn, none)
    x_TD = numerics.random_tokens(9, 16, torch.float32)
    assert (without.tokens(x_TD) - ffn(x_TD)).abs().max() > 0.1
    mean_TO = (layer.tokens(x_TD) - ffn(x_TD)).mean(0)
    assert (mean_TO.abs() < (without.tokens(x_TD) - ffn(x_TD)).mean(0).abs().max()).all()


def test_a_router_that_looks_at_ids_is_followed() -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    data = numerics.seen(ffn)

    def gap(compensate: dict[str, object]) -> float:
        made = recipe(compensate)
        router = Router(method="hash", top_k=1, weights="one")
        spec, weights, _ = numerics.convert(ffn, made.model_copy(update={"router": router}))
        plain = dataclasses.replace(spec, compensate=Compensate())
        plain_weights = dataclasses.replace(weights, low_rank=None)
        held_EF = membership(weights.experts.neuron_EI, 48)
        down_EFO = torch.zeros(spec.num_experts, 48, 16)
        for expert, neurons in enumerate(weights.experts.neuron_EI.tolist()):
            for slot, neuron in enumerate(neurons):
                if neuron >= 0:
                    down_EFO[expert, neuron] = weights.experts.down_EOI[expert, :, slot]
        assert torch.equal(down_EFO.abs().sum(-1) > 0, held_EF > 0)
        assert weights.shared is not None
        shared_SO = weights.shared.down_EOI[0].t()
        total = 0.0
        for x_TD, h_TF, weights_TE in routed_tokens(plain, ffn, plain_weights, data):
            y_TO = torch.einsum("te,tf,efo->to", weights_TE, h_TF, down_EFO)
            y_TO = y_TO + h_TF[:, weights.shared.neuron_EI[0]] @ shared_SO
            assert weights.output_bias_O is not None
            total += float((y_TO + weights.output_bias_O - ffn(x_TD)).square().sum())
        return total

    assert gap({"refit": True, "mean": True}) < 0.9 * gap({})


def test_a_rank_may_be_a_part_of_the_width() -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    spec, weights, _ = numerics.convert(ffn, recipe({"low_rank": 0.25}))
    assert spec.low_rank == 4
    assert weights.low_rank is not None
    assert [tuple(t.shape) for t in weights.low_rank] == [(4, 16), (16, 4)]


def test_the_figures_are_those_of_tokens_that_were_held_out() -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)

    def figures(part: dict[str, object], tokens: int) -> Mapping[str, float]:
        (spec,) = make_plan(Located(ffns=(numerics.site(ffn),)), recipe(part)).specs
        return transform(ffn, spec, numerics.seen(ffn, tokens)).figures

    some, more = figures({"mean": True}, 3000), figures(PARTS[5], 3000)
    assert some["error_before"] == more["error_before"]
    assert more["error_after"] < some["error_after"] < some["error_before"]
    assert figures({"mean": True}, 500) == {"penalty": 1e-6}  # too few to hold any out
    assert not figures({"scale": True}, 3000)


def test_what_compensation_costs_is_counted_apart() -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    plan = make_plan(Located(ffns=(numerics.site(ffn),)), recipe({"low_rank": 4, "scale": True}))
    found = costs(plan, 10_000, 4)
    d_model, d_out = ffn.up_MFD.shape[2], len(ffn.down_OF)
    assert found.compensation_parameters == 4 * (d_model + d_out)
    assert found.compensation_flops == 2 * 4 * (d_model + d_out)
    plain = costs(make_plan(Located(ffns=(numerics.site(ffn),)), recipe({})), 10_000, 4)
    assert plain.flops_after + found.compensation_flops == found.flops_after
    assert plain.compensation_parameters == plain.compensation_flops == 0


def test_a_rank_that_no_map_has_is_refused() -> None:
    with pytest.raises(PlanError, match=r"no rank of 17; set `compensate\.low_rank` to 16"):
        numerics.convert(numerics.random_ffn("gelu"), recipe({"low_rank": 17}))


def test_a_shared_expert_leaves_neurons_for_the_others() -> None:
    with pytest.raises(PlanError, match=r"of all 48 neurons leaves none for the others"):
        numerics.convert(numerics.random_ffn("gelu"), recipe({}, SPLIT | {"shared": 0.999}))


def test_fewer_tokens_than_kinds_of_tokens() -> None:
    ffn = numerics.random_ffn("swiglu", dtype=torch.float32)
    experts = {"method": "token_sets", "count": 600, "width": 0.001}
    router = {"method": "ridge", "top_k": 1, "weights": "one"}
    spec, weights, _ = numerics.convert(ffn, numerics.make_recipe(experts, router))
    assert spec.width == 1
    assert len(numerics.seen(ffn)) < 600 == len(weights.experts.neuron_EI)
    assert bool((weights.experts.neuron_EI >= 0).all())


def test_only_sets_of_neurons_are_compensated() -> None:
    with pytest.raises(PlanError, match=r"`experts\.method: copy` drops no neurons"):
        numerics.convert(
            numerics.random_ffn("gelu"), recipe({"mean": True}, {"method": "copy", "count": 4})
        )


def test_solve_is_the_normal_equation() -> None:
    z_TP = numerics.random_tokens(200, 12, torch.float32, seed=1)
    y_TO = numerics.random_tokens(200, 5, torch.float32, seed=2)
    weight_T = numerics.random_tokens(200, 1, torch.float32, seed=3)[:, 0].abs() + 0.1
    sums = Sums.zeros(12, 5)
    for some in (slice(0, 70), slice(70, 200)):
        sums.add(z_TP[some], y_TO[some], weight_T[some])
    beta_PO = solve(sums, torch.full((12,), 0.3))
    wide, w = z_TP.double(), weight_T.double()
    gram = wide.t() * w @ wide
    expected = torch.linalg.solve(
        gram + torch.diag(0.3 * gram.diagonal()), wide.t() * w @ y_TO.double()
    )
    # 1e-5 is added to the penalty on purpose; the rest is float32 sums of 200 products.
    torch.testing.assert_close(beta_PO.double(), expected, rtol=0, atol=1e-4)
    direct = (w[:, None] * (y_TO.double() - wide @ beta_PO.double()) ** 2).sum()
    assert abs(sums.error(beta_PO) / float(direct) - 1) < 1e-4  # sums of 1000 float32 products


def test_a_predictor_that_is_always_zero_gets_zero() -> None:
    z_TP = numerics.random_tokens(50, 4, torch.float32)
    z_TP[:, 2] = 0
    sums = Sums.zeros(4, 3)
    sums.add(z_TP, numerics.random_tokens(50, 3, torch.float32, seed=2), torch.ones(50))
    beta_PO = solve(sums, torch.full((4,), 0.1))
    assert bool(beta_PO.isfinite().all())
    assert not beta_PO[2].any()


def test_the_basis_of_a_low_rank_map_is_the_best_one() -> None:
    """A map of rank 3 is read through 3 directions without loss; a random basis loses."""
    z_TP = (
        numerics.random_tokens(300, 10, torch.float64) @ torch.diag(torch.arange(1.0, 11)).double()
    )
    beta_PO = numerics.random_tokens(10, 3, torch.float64, seed=4) @ numerics.random_tokens(
        3, 6, torch.float64, seed=5
    )
    basis_PR = input_basis(beta_PO, z_TP.t() @ z_TP, 3).double()

    def lost(basis: torch.Tensor) -> float:
        read = z_TP @ basis
        best = torch.linalg.lstsq(read, z_TP @ beta_PO).solution
        return float((read @ best - z_TP @ beta_PO).norm() / (z_TP @ beta_PO).norm())

    assert lost(basis_PR) < 1e-6  # the basis is float32
    assert lost(numerics.random_tokens(10, 3, torch.float64, seed=6)) > 0.1
