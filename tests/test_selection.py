"""Which experts a token visits: the rules by their definitions, and each where it becomes another.

Scores are float64, so ties and sums are those of the definition.
"""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_case import moe, save
from torch import nn

from upcycle.layers.config import RouterConfig, SelectConfig
from upcycle.layers.moe import MoE, rebalance
from upcycle.layers.router import Router
from upcycle.layers.selection import Selected, select, tsallis_entropy
from upcycle.onnx.run import session
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.export import export_onnx

EXPERTS = 6
RULES: dict[str, dict[str, Any]] = {
    "top_k": {"k": 2},
    "all": {"k": EXPERTS},
    "top_p": {"k": 4, "mass": 0.6},
    "entropy": {"k": 1, "mass": 0.5, "above": 0.8, "q": 1.1},
    "null": {"k": 3, "nulls": 4},
    "expert_choice": {"k": 1},
}
BOUNDS = {  # experts of a token, fewest and most
    "top_k": (2, 2),
    "all": (EXPERTS, EXPERTS),
    "top_p": (1, 4),
    "entropy": (1, EXPERTS),
    "null": (0, 3),
    "expert_choice": (0, EXPERTS),
}


def scores(rule: str, tokens: int = 40, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    columns = EXPERTS + RULES[rule].get("nulls", 0)
    return spread * numerics.random_tokens(tokens, columns, torch.float64, seed=seed)


def chosen(found: Selected, count: int = EXPERTS) -> torch.Tensor:
    """Which experts each token visits, [T, E] bool."""
    index_TK, mask_TK = found
    mask_TK = torch.ones_like(index_TK, dtype=torch.bool) if mask_TK is None else mask_TK
    visits = torch.zeros(len(index_TK), count, dtype=torch.int64)
    return visits.scatter_add(1, index_TK, mask_TK.long()).bool()


def select_config(rule: str, **more: Any) -> SelectConfig:
    return SelectConfig(rule=rule, **{**RULES[rule], **more})


def run(rule: str, scores_TE: torch.Tensor, **more: Any) -> torch.Tensor:
    return chosen(select(scores_TE, select_config(rule, **more)))


@pytest.mark.parametrize("rule", RULES)
def test_indices_are_distinct_and_counts_are_within_bounds(rule: str) -> None:
    for seed in range(5):
        index_TK, _ = select(scores(rule, seed=seed), select_config(rule))
        assert all(len(set(row)) == len(row) for row in index_TK.tolist())
        count_T = run(rule, scores(rule, seed=seed)).sum(1)
        least, most = BOUNDS[rule]
        assert count_T.min() >= least
        assert count_T.max() <= most


@pytest.mark.parametrize("rule", RULES)
def test_renumbered_experts_are_chosen_by_the_same_tokens(rule: str) -> None:
    scores_TE = scores(rule)
    order_E = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))
    renumbered = torch.cat([scores_TE[:, order_E], scores_TE[:, EXPERTS:]], 1)
    assert torch.equal(run(rule, renumbered), run(rule, scores_TE)[:, order_E])


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"expert_choice"}))
def test_a_token_does_not_depend_on_the_others(rule: str) -> None:
    scores_TE = scores(rule)
    alone = torch.cat([run(rule, row_E[None]) for row_E in scores_TE])
    assert torch.equal(alone, run(rule, scores_TE))


def test_expert_choice_depends_on_the_other_tokens() -> None:
    scores_TE = scores("expert_choice")
    changed = scores_TE.clone()
    changed[-1] += torch.tensor([20.0, 0, 0, 0, 0, 0])
    before, after = run("expert_choice", scores_TE), run("expert_choice", changed)
    assert not torch.equal(before[:-1], after[:-1])


@given(st.integers(1, 30), st.integers(1, EXPERTS), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_top_p_is_the_smallest_set_over_the_mass(
    tokens: int, k: int, mass: float, seed: int
) -> None:
    scores_TE = scores("top_p", tokens, seed)
    p_TE = scores_TE.softmax(-1)
    found = run("top_p", scores_TE, k=k, mass=mass)
    for p_E, chosen_E in zip(p_TE.tolist(), found.tolist(), strict=True):
        order = sorted(range(EXPERTS), key=lambda e: -p_E[e])
        fewest = next(
            (n for n in range(1, EXPERTS) if math.fsum(p_E[e] for e in order[:n]) > mass), EXPERTS
        )
        expected = set(order[: min(fewest, k)])
        got = {e for e in range(EXPERTS) if chosen_E[e]}
        if got != expected:  # the sum is the mass, up to the last bits
            crossing = math.fsum(p_E[e] for e in order[: min(len(got), len(expected))])
            assert abs(crossing - mass) < EXPERTS * 2**-52


def test_top_p_is_nested_and_has_both_ends() -> None:
    scores_TE = scores("top_p")
    sets = [run("top_p", scores_TE, k=EXPERTS, mass=m) for m in (0.0, 0.3, 0.6, 0.9, 1.0)]
    for less, more in pairwise(sets):
        assert not (less & ~more).any()
    assert torch.equal(sets[0], run("top_k", scores_TE, k=1))
    assert sets[-1].all()
    uniform = torch.zeros(1, 16).double()  # floor(0.4 * 16) + 1
    assert chosen(select(uniform, SelectConfig(rule="top_p", k=16, mass=0.4)), 16).sum() == 7


def test_entropy_becomes_top_k_and_dense() -> None:
    scores_TE = scores("entropy")
    never = run("entropy", scores_TE, above=math.inf, mass=0.0, k=2)
    assert torch.equal(never, run("top_k", scores_TE, k=2))
    assert run("entropy", scores_TE, above=-1.0).all()
    counts = [run("entropy", scores_TE, above=a).sum() for a in (0.2, 0.5, 0.8, 0.95)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_entropy_leaves_the_crossing_expert_out() -> None:
    p_E = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.03, 0.01]]).double()
    visits = run("entropy", p_E.log(), above=2.0, mass=0.85, k=1)
    assert visits.tolist() == [[True, True, False, False, False, False]]
    assert run("top_p", p_E.log(), mass=0.85).sum() == 3


@pytest.mark.parametrize("q", [0.5, 1, 1.1, 2])
def test_tsallis_entropy_at_both_ends(q: float) -> None:
    ends = torch.stack([torch.full((7,), 1 / 7, dtype=torch.float64), torch.eye(7)[3].double()])
    got = tsallis_entropy(ends, q)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-14)


def test_tsallis_entropy_of_index_near_one_is_shannons() -> None:
    p_TE = scores("top_k").softmax(-1)
    near, shannon = tsallis_entropy(p_TE, 1 + 1e-6), tsallis_entropy(p_TE, 1)
    # The derivative in q is below (log E)^2 / log E for these p: a few times 1e-6.
    torch.testing.assert_close(near, shannon, rtol=0, atol=1e-5)


def test_nulls_that_never_win_leave_top_k() -> None:
    scores_TE = scores("null")
    scores_TE[:, EXPERTS:] = -torch.inf
    assert torch.equal(run("null", scores_TE, k=2), run("top_k", scores_TE[:, :EXPERTS], k=2))


@pytest.mark.parametrize(("copies", "k"), [(1, 3), (2, 4)])
def test_copied_null_rows_leave_the_best_two(copies: int, k: int) -> None:
    """Rows of nulls start as copies of the true ones, and a tie goes to the true expert."""
    true_TE = scores("top_k")
    scores_TE = true_TE.repeat(1, 1 + copies)
    found = run("null", scores_TE, k=k, nulls=copies * EXPERTS)
    assert torch.equal(found, run("top_k", true_TE, k=2))


def test_a_token_of_nulls_alone_visits_nobody() -> None:
    scores_TE = scores("null")
    scores_TE[:7, EXPERTS:] += 100
    count_T = run("null", scores_TE).sum(1)
    assert (count_T[:7] == 0).all()
    assert (count_T[7:] > 0).any()


def test_expert_choice_fills_every_expert() -> None:
    for tokens in (1, 2, 5, 40):
        load_E = run("expert_choice", scores("expert_choice", tokens)).sum(0)
        assert (load_E == max(1, math.ceil(tokens / EXPERTS))).all()


# Weights and balance


def router(rule: str, weights: str = "renormalised", **more: Any) -> Router:
    """A linear router whose scores are its tokens, so that tests can give scores."""
    nulls = RULES[rule].get("nulls", 0)
    config = RouterConfig(
        kind="linear",
        num_experts=EXPERTS,
        d_model=EXPERTS + nulls,
        select=select_config(rule),
        weights=weights,
        scale=1.0,
        nulls=nulls,
        **more,
    )
    made = Router(config).double().eval()
    made.weight.data.copy_(torch.eye(config.d_model))
    return made


@pytest.mark.parametrize("weights", ["renormalised", "renorm_detach", "softmax", "one", "gain"])
@pytest.mark.parametrize("rule", RULES)
def test_weights_are_on_the_simplex(rule: str, weights: str) -> None:
    x_TD = scores(rule)
    _, weights_TK, index_TK = router(rule, weights)(x_TD)
    visits_TE = run(rule, x_TD)
    total_T, count_T = weights_TK.sum(-1), visits_TE.sum(-1).double()
    assert (weights_TK >= 0).all()
    dense_TE = torch.zeros(len(x_TD), EXPERTS).double().scatter_add(1, index_TK, weights_TK)
    assert torch.equal(dense_TE > 0, visits_TE)
    if weights in ("renormalised", "renorm_detach"):
        torch.testing.assert_close(total_T, count_T.clamp(max=1), rtol=0, atol=1e-14)
    elif weights == "softmax":
        assert (total_T <= 1 + 1e-14).all()
    else:
        assert torch.equal(total_T, count_T)


@pytest.mark.parametrize(
    ("rule", "weights", "reaches"),
    [
        ("top_p", "renorm_detach", True),
        ("top_p", "one", True),  # straight through: the weights are one, their gradient is p's
        ("all", "one", False),  # no choice, nothing to learn
    ],
)
def test_the_gradient_of_the_sum_of_weights_reaches_the_router(
    rule: str, weights: str, reaches: bool
) -> None:
    layer = router(rule, weights)
    _, weights_TK, _ = layer(scores(rule))
    if weights_TK.requires_grad:
        weights_TK.sum().backward()
    assert (layer.weight.grad is not None and bool(layer.weight.grad.any())) is reaches


def test_the_balance_bias_chooses_and_does_not_weigh() -> None:
    layer, plain = router("top_k", "softmax", balance=True), router("top_k", "softmax")
    x_TD = scores("top_k")
    assert all(torch.equal(a, b) for a, b in zip(layer(x_TD), plain(x_TD), strict=True))
    layer.selection_bias[3] = 2.0
    _, weights_TK, index_TK = layer(x_TD)
    assert (index_TK == 3).any(-1).all()
    torch.testing.assert_close(weights_TK, x_TD.softmax(-1).gather(-1, index_TK), rtol=0, atol=0)


def balanced_layer() -> MoE:
    layer = moe("relu", num_experts=EXPERTS)
    made = MoE(replace(layer.config, router=replace(layer.config.router, balance=True)))
    made.load_state_dict({**layer.state_dict(), "router.selection_bias": torch.zeros(EXPERTS)})
    return made


def test_rebalancing_spreads_the_load() -> None:
    layer, x_TD = balanced_layer().train(), numerics.random_tokens(600, 16, torch.float32)
    layer.router.bias.data[0] += 3  # everyone likes the first

    def spread() -> float:
        index_TK = layer.router(x_TD)[2]
        return float(torch.bincount(index_TK.flatten(), minlength=EXPERTS).double().std())

    before = spread()
    layer.router.rebalance()
    layer.router.selection_bias.zero_()
    for _ in range(100):
        layer.router(x_TD)
        rebalance(nn.Sequential(layer), rate=0.01)
    assert spread() < before / 5


def test_rebalancing_is_the_sign_of_the_load_and_never_happens_in_eval() -> None:
    layer, x_TD = balanced_layer().eval(), numerics.random_tokens(50, 16, torch.float32)
    layer.router(x_TD)
    layer.router.rebalance()
    assert not layer.router.selection_bias.any()
    layer.train()
    load_E = torch.bincount(layer.router(x_TD)[2].flatten(), minlength=EXPERTS).double()
    layer.router.rebalance(0.5)
    assert torch.equal(layer.router.selection_bias, (0.5 * (load_E.mean() - load_E).sign()).float())
    layer.router.rebalance(0.5)  # nothing was counted since
    assert torch.equal(layer.router.selection_bias, (0.5 * (load_E.mean() - load_E).sign()).float())


def test_the_balance_bias_is_stored_and_is_no_parameter() -> None:
    layer = balanced_layer()
    assert "router.selection_bias" in layer.state_dict()
    assert not any(p is layer.router.selection_bias for p in layer.parameters())


# Fewer than Kmax experts, and none, in every kernel


def uneven(rule: str, weights: str, activation: str = "silu") -> MoE:
    config = moe(activation, num_experts=EXPERTS).config
    made_of = select_config(rule)
    router = replace(config.router, select=made_of, weights=weights, nulls=made_of.nulls)
    layer = MoE(replace(config, router=router)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = 3.0 if name.startswith("router") else 1.0
            parameter.normal_(generator=generator).mul_(size / parameter.shape[-1] ** 0.5)
    return layer


def reference(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens in float64."""
    wide = copy.deepcopy(layer).double()
    x_TD = x_TD.double()
    _, weights_TK, index_TK = layer.router(x_TD.float())
    weight_TE = (
        torch.zeros(len(x_TD), EXPERTS).double().scatter_add(1, index_TK, weights_TK.double())
    )
    added = [weight_TE[:, e, None] * wide.experts.expert(e, x_TD) for e in range(EXPERTS)]
    assert wide.output_bias is not None
    return sum(added, wide.output_bias.expand(len(x_TD), -1))


# Values of the layers are below 30, sums have at most 6 * (16 + 12) terms: 200 roundings of 2^-24.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 30 * 200 * 2**-24}
UNEVEN = [
    (rule, weights) for rule in RULES for weights in ("renormalised", "softmax", "one", "gain")
]


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "masked"])
@pytest.mark.parametrize(("rule", "weights"), UNEVEN)
def test_every_kernel_leaves_experts_out(rule: str, weights: str, kernel: str) -> None:
    layer, x_TD = uneven(rule, weights), numerics.random_tokens(37, 16, torch.float32)
    _, weights_TK, index_TK = layer.router(x_TD)
    if BOUNDS[rule][0] == 0:
        assert (weights_TK.sum(1) == 0).any(), "some token visits nobody"
    if kernel == "masked":
        y_TO = layer.experts.masked_forward(x_TD, index_TK, weights_TK) + layer.output_bias
    else:
        layer.experts.config._experts_implementation = kernel
        y_TO = layer(x_TD)
    torch.testing.assert_close(y_TO.double(), reference(layer, x_TD), **CLOSE)


class Side(nn.Module):
    """Layers side by side: one file tests them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(uneven(rule, weights) for rule, weights in UNEVEN).eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.fixture(scope="module")
def side() -> Side:
    return Side().eval()


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("form", ["fused", "unrolled"])
def test_onnx_leaves_experts_out(form: Any, side: Side, tmp_path: Path) -> None:
    example = (numerics.random_tokens(5, 16, torch.float32, seed=9),)
    path = export_onnx(
        side,
        example,
        path=tmp_path / "m.onnx",
        stored=save(side, tmp_path),
        options=Onnx(form=form),
    )
    for tokens in (1, 37):
        x_TD = numerics.random_tokens(tokens, 16, torch.float32)
        got = session(path).run(None, {"x": x_TD.numpy()})
        for case, layer, y in zip(UNEVEN, side.layers, got, strict=True):
            with torch.no_grad():
                expected = reference(layer, x_TD)
            torch.testing.assert_close(
                torch.from_numpy(y).double(), expected, **CLOSE, msg=lambda m, c=case: f"{c}: {m}"
            )
