"""Operations on a mixture of experts that is there: place, prune.

Shape suffixes: L layers, E experts, C devices.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

import native_moes
import numpy as np
import pytest
import small_models
import torch
from command_line import run
from transformers import LlamaForCausalLM

import upcycle
from upcycle.errors import UnsupportedError, UsageError
from upcycle.operations import placement
from upcycle.operations.placement import Placement, place
from upcycle.operations.prune import importance, prune
from upcycle.operations.renumber import renumber
from upcycle.routing.contract import routed_layers
from upcycle.routing.trace import Trace

EPS = torch.finfo(torch.float32).eps
ROUNDING = 30 * 8 * EPS  # as in test_routing.py
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def made(*index: np.ndarray, experts: int) -> Trace:
    """A trace of one expert a token."""
    arrays = tuple(layer.astype(np.int32)[:, None] for layer in index)
    tokens = tuple(np.arange(len(layer)) for layer in index)
    weights = tuple(np.ones(layer.shape, dtype=np.float32) for layer in arrays)
    paths = tuple(f"layers.{i}" for i in range(len(index)))
    return Trace(paths, (experts,) * len(index), arrays, weights, tokens, tokens)


def drawn(seed: int, layers: int, experts: int, tokens: int = 60) -> Trace:
    generator = np.random.default_rng(seed)
    return made(*generator.integers(0, experts, (layers, tokens)), experts=experts)


def converted(recipe: str = "drop-upcycling", *sets: str) -> Any:
    sets = ("experts.count=8", "verify.max_relative_error=99", *sets)
    dense = small_models.build("llama")
    return upcycle.convert(dense, recipe, overrides=sets).model.eval()


@pytest.fixture(params=["ours", *native_moes.FAMILIES])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "ours":
        return converted("drop-upcycling", "router.std=1")
    return native_moes.native(request.param)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens).logits
    return found


def traced(model: Any) -> Trace:
    with upcycle.trace(model) as seen:
        logits(model)
    return seen.result()


# Where experts are placed


def cost(devices: tuple[np.ndarray, ...], trace: Trace) -> float:
    """Tokens that change devices, by the token and by the pair of layers."""
    hops = [
        a[here[:, 0]] != b[there[:, 0]]
        for (a, b), (here, there) in zip(
            itertools.pairwise(devices), itertools.pairwise(trace.index), strict=True
        )
    ]
    return float(np.mean(hops))


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all_placements(seed: int) -> None:
    """N = 4, L = 2, C = 2, against every placement there is."""
    trace = drawn(seed, layers=2, experts=4)
    halves = [np.array(half) for half in set(itertools.permutations([0, 0, 1, 1]))]
    best = min(cost(pair, trace) for pair in itertools.product(halves, halves))
    found = place(trace, 2)
    assert found.is_best
    assert abs(found.cost - best) <= 60 * np.finfo(float).eps
    assert abs(cost(found.devices, trace) - found.cost) <= 60 * np.finfo(float).eps


def test_the_sweeps_find_the_best_of_small_placements_too(monkeypatch: pytest.MonkeyPatch) -> None:
    best = [place(drawn(seed, layers=3, experts=4), 2).cost for seed in range(6)]
    monkeypatch.setattr(placement, "SMALL", 0)
    swept = [place(drawn(seed, layers=3, experts=4), 2) for seed in range(6)]
    assert not all(found.is_best for found in swept)
    assert all(found.cost >= b - 1e-12 for found, b in zip(swept, best, strict=True))
    assert np.mean([f.cost == b for f, b in zip(swept, best, strict=True)]) >= 0.5


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_every_device_gets_as_many_and_nothing_costs_more(
    devices: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "SMALL", 0)
    found = place(drawn(3, layers=5, experts=8, tokens=400), devices, nodes)
    for device_E in found.devices:
        assert np.bincount(device_E, minlength=devices).tolist() == [8 // devices] * devices
    assert found.cost <= found.contiguous
    assert found.cost <= found.random


def test_tokens_that_stay_in_blocks_never_change_devices() -> None:
    generator = np.random.default_rng(0)
    block = generator.integers(0, 4, 500)
    layers = [generator.permutation(8)[2 * block + generator.integers(0, 2, 500)] for _ in range(4)]
    found = place(made(*layers, experts=8), 4)
    assert found.cost == 0
    assert found.contiguous > 0.5
    assert found.is_best


def test_without_affinity_a_token_is_elsewhere_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "SMALL", 0)
    found = place(drawn(1, layers=2, experts=4, tokens=40_000), 4)
    # 40,000 draws with p = 3/4: six deviations are 0.013, and 16 placements are looked at.
    assert abs(found.random - 0.75) < 0.013
    assert 0.75 - 2 * 0.013 < found.cost <= found.random


@pytest.mark.parametrize(
    ("devices", "nodes", "said"),
    [(3, 1, "8 experts cannot"), (1, 1, "devices: 1"), (4, 3, "nodes: 3"), (16, 1, "8 experts")],
)
def test_what_cannot_be_shared_out_is_refused(devices: int, nodes: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        place(drawn(0, layers=2, experts=8), devices, nodes)
    with pytest.raises(UsageError, match="no token that passes two layers"):
        place(drawn(0, layers=1, experts=8), 2)


def test_renumbered_experts_compute_the_same(model: Any) -> None:
    before, trace = logits(model), traced(model)
    found = place(trace, 4)
    assert any((found.order(layer) != np.arange(8)).any() for layer in (0, 1))
    renumber(model, found)
    assert float((logits(model) - before).abs().max()) <= ROUNDING
    moved = traced(model)
    for layer in (0, 1):
        was = found.order(layer)[moved.index[layer]]
        assert np.array_equal(np.sort(was), np.sort(trace.index[layer]))


def test_experts_without_their_router_rows_compute_something_else() -> None:
    """What the test above would notice."""
    model = native_moes.native("Mixtral")
    before = logits(model)
    experts = routed_layers(model)[0].experts
    experts.down_proj.data = experts.down_proj.data.roll(1, 0)
    assert float((logits(model) - before).abs().max()) > 100 * ROUNDING


def test_routers_without_rows_are_refused() -> None:
    model = converted("moefication", "router.top_k=4", "router.method=mlp")
    order = tuple(np.arange(8) // 4 for _ in routed_layers(model))
    with pytest.raises(UnsupportedError, match="no row for each expert"):
        renumber(model, Placement(order, 0, 0, 0, True))
    grouped = native_moes.native("Glm4Moe")
    for layer in routed_layers(grouped):
        layer.router.n_group = 2
    with pytest.raises(UnsupportedError, match="groups"):
        renumber(grouped, Placement(tuple(np.arange(8) // 4 for _ in (0, 1)), 0, 0, 0, True))


# Experts that are removed


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": TOKENS}]


def test_importance_is_what_it_is_said_to_be(model: Any) -> None:
    trace = traced(model)
    by = {kind: importance(model, batches(), kind) for kind in ("frequency", "mass", "norm")}
    for number, path in enumerate(trace.paths):
        index, weights = trace.index[number], trace.weights[number].astype(float)
        for e in range(8):
            visits = index == e
            assert by["frequency"][path][e] == visits.sum()
            assert abs(by["mass"][path][e] - weights[visits].sum()) <= 20 * EPS * weights.sum()
        assert ((by["norm"][path] > 0) == (by["frequency"][path] > 0)).all()


def test_experts_that_nobody_visits_are_removed_without_a_trace(model: Any) -> None:
    """Of weights that sum to one by rule, or are a softmax over what is left."""
    tokens = TOKENS[:1, :1]
    visited = [len(set(layer.ravel())) for layer in _index(model, tokens)]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    prune(model, [{"input_ids": tokens}], keep=max(visited), by="frequency")
    with torch.no_grad():
        after = model(input_ids=tokens).logits
    if getattr(routed_layers(model)[0].router, "norm_topk_prob", True):
        assert float((after - before).abs().max()) <= ROUNDING
    else:  # a softmax over fewer experts has larger parts
        assert float((after - before).abs().max()) > ROUNDING


def _index(model: Any, tokens: torch.Tensor) -> tuple[np.ndarray, ...]:
    with upcycle.trace(model) as seen, torch.no_grad():
        model(input_ids=tokens)
    return seen.result().index


def test_a_pruned_model_is_smaller_and_goes_on(model: Any, tmp_path: Path) -> None:
    before = copy.deepcopy(model)
    left = prune(model, batches(), keep=4).left
    for layer in routed_layers(model):
        assert layer.num_experts == 4
        kept = list(left[layer.path])
        old = before.get_submodule(layer.path).experts.down_proj
        assert torch.equal(layer.experts.down_proj, old[kept])
    assert logits(model).isfinite().all()
    if isinstance(model, LlamaForCausalLM):  # as converted in memory; its files are tested below
        return
    model.save_pretrained(tmp_path)
    again: Any = upcycle.load(tmp_path)
    assert float((logits(again) - logits(model)).abs().max()) <= ROUNDING


def test_a_model_that_returns_its_router_logits(tmp_path: Path) -> None:
    """As training with a balance loss leaves it."""
    model = native_moes.native("Mixtral", output_router_logits=True)
    model.save_pretrained(tmp_path / "moe")
    out = tmp_path / "pruned"
    torch.save({"input_ids": TOKENS}, tmp_path / "ids.pt")
    data = ("--data", tmp_path / "ids.pt", "--allow-pickle")
    run("prune", tmp_path / "moe", "--keep", 3, *data, "--out", out)
    again: Any = upcycle.load(out)
    found = again(input_ids=TOKENS, labels=TOKENS)
    assert found.router_logits[0].shape == (TOKENS.numel(), 3)
    assert found.loss.isfinite()
    prune(model, batches(), keep=3)
    assert model(input_ids=TOKENS, labels=TOKENS).loss.isfinite()


@pytest.mark.parametrize("keep", [1, 9])
def test_as_many_as_a_token_visits_are_left(keep: int) -> None:
    with pytest.raises(UsageError, match=f"keep: {keep}: .* choose 2 to 8"):
        prune(native_moes.native("Mixtral"), batches(), keep)
