"""Splits that look at data: what they find, what they share, and what they refuse."""

import dataclasses
import itertools
from typing import Any

import numerics
import pytest
import torch

from upcycle.errors import PlanError, UsageError
from upcycle.ir.ffn import Located
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, FFNWeights, MoEWeights
from upcycle.layers.moe import all_experts
from upcycle.passes.experts.activation_carve import carve
from upcycle.passes.experts.coactivation import bisected, counts, refined, within
from upcycle.passes.experts.markers import mark
from upcycle.passes.experts.method import Parts
from upcycle.passes.experts.split import by_turns, group_sizes
from upcycle.passes.experts.useful import profile, ranks, usefulness
from upcycle.passes.plan.adaptive_sizes import adaptive_shared
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.transform.transform import transform
from upcycle.recipe.schema import Experts

GROUPS = 4


def planted(groups: int = GROUPS, each: int = 12) -> tuple[FFNWeights, FFNInputs, torch.Tensor]:
    """A ReLU FFN whose neurons fire for the tokens of one of `groups` directions, shuffled."""
    generator = torch.Generator().manual_seed(0)
    label_F = torch.randperm(groups * each, generator=generator) % groups
    up_FD = torch.eye(groups)[label_F] + 0.2 * torch.rand(len(label_F), groups, generator=generator)
    ffn = numerics.random_ffn("relu", d_model=groups, d_ff=len(label_F), bias=False)
    ffn = dataclasses.replace(ffn, up_MFD=up_FD[None].double())
    x_TD = torch.eye(groups)[torch.arange(600) % groups] * 2 - 0.3
    x_TD = x_TD + 0.1 * torch.randn(x_TD.shape, generator=generator)
    return ffn, FFNInputs((x_TD[:333], x_TD[333:])), label_F


def made(
    ffn: FFNWeights, experts: dict[str, Any], data: FFNInputs | None = None, **router: Any
) -> tuple[MoESpec, MoEWeights]:
    rule = {"method": "avg_key", "top_k": 1, "weights": "one", **router}
    (spec,) = make_plan(
        Located(ffns=(numerics.site(ffn),)), numerics.make_recipe(experts, rule)
    ).specs
    return spec, transform(ffn, spec, numerics.seen(ffn) if data is None else data)


def groups_of(experts: ExpertWeights) -> set[frozenset[int]]:
    return {frozenset(n for n in row if n >= 0) for row in experts.neuron_EI.tolist()}


@pytest.mark.parametrize("method", ["coactivation", "activation_carve", "universal_specialised"])
def test_neurons_that_are_active_together_are_found(method: str) -> None:
    ffn, data, label_F = planted()
    wanted = {frozenset((label_F == g).nonzero()[:, 0].tolist()) for g in range(GROUPS)}
    if method == "universal_specialised":  # whole texts of one kind
        x_TD = torch.cat(data.x)
        data = FFNInputs((x_TD[(torch.arange(600) % GROUPS).argsort(stable=True)],))
    _, weights = made(ffn, {"method": method, "count": GROUPS, "markers": 12}, data)
    assert groups_of(weights.experts) == wanted
    _, by_chance = made(ffn, {"method": "random", "count": GROUPS}, data)
    assert groups_of(by_chance.experts) != wanted


def test_counts_are_the_tokens_that_mark_both() -> None:
    ffn = numerics.random_ffn("swiglu")
    markers = mark(ffn, numerics.seen(ffn), 6, unit=False)
    bits_FT = torch.cat(list(markers.chunks()), dim=1)
    want_FF = bits_FT @ bits_FT.t()
    assert torch.equal(torch.from_numpy(counts(markers).toarray()), want_FF.fill_diagonal_(0))


def test_a_cut_of_a_small_graph_is_the_best_there_is() -> None:
    ffn = numerics.random_ffn("relu", d_ff=8)
    together_FF = counts(mark(ffn, numerics.seen(ffn), 3, unit=False))
    start_F = bisected(together_FF, [4, 4], torch.Generator().manual_seed(0))
    found = within(together_FF, refined(together_FF, start_F, [4, 4]))
    every = []
    for some in itertools.combinations(range(1, 8), 3):
        labels_F = torch.ones(8, dtype=torch.int64)
        labels_F[[0, *some]] = 0
        every.append(within(together_FF, labels_F.numpy()))
    assert found == pytest.approx(max(every), abs=1e-12)
    assert min(every) < max(every)


def test_carving_never_ends_further_than_it_began() -> None:
    ffn = numerics.random_ffn("swiglu", d_ff=60)
    markers = mark(ffn, numerics.seen(ffn), 5)

    def total(labels_F: torch.Tensor) -> float:
        member_KF = labels_F == torch.arange(7)[:, None]
        return float(markers.distances(member_KF)[member_KF].double().sum())

    labels_F = carve(markers, group_sizes(60, 7))
    assert torch.bincount(labels_F).tolist() == group_sizes(60, 7)
    others = [
        torch.arange(60)[torch.randperm(60, generator=torch.Generator().manual_seed(s))] % 7
        for s in range(20)
    ]
    assert total(labels_F) < min(map(total, others))


def test_importance_is_dealt_like_cards() -> None:
    ffn = numerics.random_ffn("gelu", d_ff=10)
    data = dataclasses.replace(
        numerics.seen(ffn), importance_NF=torch.tensor([[9.0, 0, 8, 1, 7, 2, 6, 3, 5, 4]])
    )
    _, weights = made(ffn, {"method": "importance", "count": 3}, data)
    # By importance: 0 2 4 6 8 9 7 5 3 1.
    assert weights.experts.neuron_EI.tolist() == [[0, 1, 6, 7], [2, 5, 8, -1], [3, 4, 9, -1]]
    shared = {"method": "importance", "count": 5, "shared": 1, "shared_by": "importance"}
    _, weights = made(ffn, shared, data)
    assert weights.shared is not None
    assert weights.shared.neuron_EI.tolist() == [[0, 2]]
    assert by_turns(torch.arange(4), 3, 2).tolist() == [[0, 3], [1, -1], [2, -1]]


def test_important_neurons_are_in_every_expert_of_an_overlap() -> None:
    ffn = numerics.random_ffn("gelu", d_ff=12)
    data = dataclasses.replace(numerics.seen(ffn), importance_NF=torch.arange(12.0)[None])
    recipe = {"method": "importance_overlap", "count": 3, "common": 0.5}
    spec, weights = made(ffn, recipe, data)
    assert spec.promise == "approximate"
    # Of four neurons two are the best ones, 10 and 11; then 9, 8, 7, 6, 5, 4 are dealt.
    assert weights.experts.neuron_EI.tolist() == [[10, 11, 6, 9], [10, 11, 5, 8], [10, 11, 4, 7]]
    _, whole = made(ffn, {**recipe, "count": 1}, data)
    assert sorted(whole.experts.neuron_EI[0].tolist()) == list(range(12))
    _, wide = made(ffn, {**recipe, "width": 1.0}, data)
    neurons = wide.experts.neuron_EI
    assert neurons.shape == (3, 12)
    assert (neurons >= 0).sum(1).tolist() == [8, 8, 8]  # two more of each of three, then no more


def test_domains_share_out_the_neurons_as_well_as_can_be() -> None:
    ffn = numerics.random_ffn("gelu", d_ff=8)
    importance_NF = torch.rand(2, 8, generator=torch.Generator().manual_seed(3))
    importance_NF[1] *= 1000  # a domain of large gradients gets no more for it
    data = dataclasses.replace(numerics.seen(ffn), importance_NF=importance_NF)
    _, weights = made(ffn, {"method": "gradient_domain", "count": 2}, data)
    rank_NF = ranks(importance_NF)

    def total(first: tuple[int, ...]) -> float:
        rest = [n for n in range(8) if n not in first]
        return float(rank_NF[0, list(first)].sum() + rank_NF[1, rest].sum())

    best = max(total(first) for first in itertools.combinations(range(8), 4))
    assert total(tuple(weights.experts.neuron_EI[0].tolist())) == pytest.approx(best, abs=1e-6)
    _, overlap = made(ffn, {"method": "gradient_domain_overlap", "count": 2}, data)
    assert overlap.experts.neuron_EI.tolist() == [
        sorted(row.topk(4).indices.tolist()) for row in importance_NF
    ]


@pytest.mark.parametrize("method", ["gradient_domain", "gradient_domain_overlap"])
def test_another_number_of_domains_is_refused(method: str) -> None:
    ffn = numerics.random_ffn("gelu")
    with pytest.raises(UsageError, match="3 routed experts and 2 domains") as caught:
        made(ffn, {"method": method, "count": 3})
    assert str(caught.value).startswith("mlp: ")
    assert "\n" not in str(caught.value)


def test_ranks_are_of_each_domain_by_itself() -> None:
    got = ranks(torch.tensor([[3.0, 1, 2], [0, 5000, 10]]))
    assert torch.equal(got, torch.tensor([[2.0, 0, 1], [0, 2, 1]]) / 3)


def test_profiles_are_means_over_domains_or_blocks() -> None:
    ffn = numerics.random_ffn("swiglu")
    data = numerics.seen(ffn)
    x_TD = torch.cat(data.x)
    gate_TF = torch.nn.functional.silu(
        torch.nn.functional.linear(x_TD, ffn.up_MFD[0].float(), ffn.up_bias_MF[0].float())
    ).abs()
    by_domain = torch.stack([gate_TF[0::2].mean(0), gate_TF[1::2].mean(0)], dim=1)
    bound = 512 * 2**-24 * float(gate_TF.max())
    torch.testing.assert_close(profile(ffn, data), by_domain, rtol=0, atol=bound)
    blocks = profile(ffn, FFNInputs(data.x))
    want = gate_TF.reshape(64, 8, -1).mean(1).t()
    torch.testing.assert_close(blocks, want, rtol=0, atol=bound)
    assert profile(ffn, FFNInputs((x_TD[:3],))).shape == (48, 3)


@pytest.mark.parametrize(
    "by", ["norm", "rate", "contribution", "steady", "importance", "domains", "first"]
)
def test_shared_neurons_are_the_most_useful_ones(by: str) -> None:
    ffn = numerics.random_ffn("swiglu")
    recipe = {"method": "contiguous", "count": 4, "shared": 1, "shared_by": by, "markers": 5}
    spec, weights = made(ffn, recipe)
    score_F = usefulness(ffn, spec.experts, numerics.seen(ffn), width=spec.width)
    assert weights.shared is not None
    chosen = weights.shared.neuron_EI[0]
    left = weights.experts.neuron_EI.flatten()
    assert score_F[chosen].min() >= score_F[left[left >= 0]].max()
    layer = numerics.run_layer(spec, weights)
    x_TD = numerics.random_tokens(20, 16, torch.float64)
    with all_experts(layer):
        bound = numerics.bound([ffn], x_TD, torch.float64, experts=4)
        numerics.assert_equal_up_to_rounding(layer(x_TD).detach(), ffn(x_TD), bound)


def test_domains_count_in_how_many_top_lists_a_neuron_is() -> None:
    ffn = numerics.random_ffn("gelu", d_ff=6)
    importance_NF = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 1, 5, 2, 3, 4], [1, 6, 5, 2, 4, 3]])
    data = dataclasses.replace(numerics.seen(ffn), importance_NF=importance_NF)
    experts = Experts(method="random", count=3, shared=1, shared_by="domains")
    score_F = usefulness(ffn, experts, data, width=2)
    assert score_F.floor().tolist() == [2, 2, 2, 0, 0, 0]
    assert score_F[2] > score_F[1]  # of equals, the better mean rank


def test_a_shared_ratio_for_each_layer_keeps_the_mean() -> None:
    ffn = numerics.random_ffn("swiglu")
    recipe = numerics.make_recipe(
        {"method": "contiguous", "count": 6, "shared": 2, "shared_by": "rate", "adaptive": True},
        {"method": "avg_key", "top_k": 1, "weights": "one"},
    )
    located = Located(ffns=tuple(numerics.site(ffn, f"mlp{i}") for i in range(3)))
    specs = make_plan(located, recipe).specs
    scores = {
        "mlp0": torch.cat([torch.ones(8), torch.zeros(40)]),  # few neurons have it all
        "mlp1": torch.linspace(1, 0, 48),
        "mlp2": torch.linspace(1, 0, 48) * 1000 + 7,  # the same in other units
    }
    new = adaptive_shared(specs, scores)
    assert [spec.shared for spec in specs] == [16, 16, 16]
    assert [spec.shared for spec in new] == [8, 20, 20]
    assert all(spec.shared + 4 * spec.width == 48 for spec in new)

    def held(chosen: tuple[int, ...]) -> float:
        total = 0.0
        for score_F, count in zip(scores.values(), chosen, strict=True):
            part_F = (score_F - score_F.min()) / (score_F - score_F.min()).sum()
            total += float(part_F.sort(descending=True).values[:count].sum())
        return total

    every = [c for c in itertools.product(range(0, 48, 4), repeat=3) if sum(c) == 48]
    assert held(tuple(s.shared for s in new)) == pytest.approx(max(map(held, every)), abs=1e-6)


@pytest.mark.parametrize(
    "experts",
    [
        {"method": "random", "count": 4, "adaptive": True},
        {"method": "random", "count": 4, "shared": 1, "adaptive": True},
        {"method": "copy", "count": 4, "adaptive": True},
    ],
)
def test_adaptive_sharing_needs_something_to_share_and_to_look_at(experts: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"experts\.adaptive"):
        made(numerics.random_ffn("gelu"), experts, method="normal")


def test_a_carved_layer_has_every_neuron_once() -> None:
    ffn = numerics.random_ffn("gelu", d_ff=7)
    _, weights = made(ffn, {"method": "activation_carve", "count": 3, "shared": 1})
    parts = Parts(weights.experts, weights.shared)
    assert parts.shared is not None
    neurons = [
        *parts.shared.neuron_EI.flatten().tolist(),
        *parts.experts.neuron_EI.flatten().tolist(),
    ]
    assert sorted(n for n in neurons if n >= 0) == list(range(7))
