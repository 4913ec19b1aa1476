"""Overrides and traces of routing, on layers of upcycle and on native ones.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

import threading
from pathlib import Path
from typing import Any

import native_moes
import numpy as np
import pytest
import small_models
import torch

import upcycle
from upcycle.errors import UnsupportedError, UsageError
from upcycle.routing import statistics
from upcycle.routing.contract import routed_layers
from upcycle.routing.trace import Trace

EPS = torch.finfo(torch.float32).eps
# Logits of these models are below 8, after some 30 roundings of numbers of that size on the way.
ROUNDING = 30 * 8 * EPS
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


SURE = {"experts.count": 4, "router.std": 1}  # scores that differ by more than rounding


def converted(recipe: str = "drop-upcycling", sets: dict[str, Any] = SURE) -> Any:
    """A small Llama."""
    sets = {"verify.max_relative_error": 99, **sets}
    overrides = [f"{key}={value}" for key, value in sets.items()]
    return upcycle.convert(small_models.build("llama"), recipe, overrides=overrides).model.eval()


@pytest.fixture(scope="module")
def ours() -> Any:
    return converted()


@pytest.fixture(scope="module", params=["ours", *native_moes.FAMILIES])
def model(request: pytest.FixtureRequest) -> Any:
    """A model of upcycle, and each native family."""
    if request.param == "ours":
        return request.getfixturevalue("ours")
    return native_moes.native(request.param)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens, **more).logits
    return found


def traced(model: Any, tokens: torch.Tensor = TOKENS, **more: Any) -> Trace:
    with upcycle.trace(model) as seen:
        logits(model, tokens, **more)
    return seen.result()


def hooks_of(model: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_nothing_overridden_is_nothing_changed(model: Any) -> None:
    before = logits(model)
    with upcycle.override(model) as done:
        assert torch.equal(logits(model), before)
    assert done.path == "same"
    assert not done.changes


def test_its_own_k_and_its_own_ranks_are_what_it_does(model: Any) -> None:
    """Bit for bit where the path is the same; a layer of ours leaves its fused call."""
    before, k = logits(model), routed_layers(model)[0].top_k
    assert k is not None
    changes: tuple[dict[str, Any], ...] = ({"k": k}, {"ranks": range(1, k + 1)})
    for change in changes:
        with upcycle.override(model, **change) as done:
            after = logits(model)
        if done.path == "same":
            assert torch.equal(after, before)
        assert distance(after, before) <= ROUNDING


def test_a_rank_is_the_expert_that_one_more_adds(model: Any) -> None:
    chosen = {}
    for k in (1, 2, 3):
        with upcycle.override(model, k=k):
            chosen[k] = traced(model).index[0]
    for rank in (2, 3):
        with upcycle.override(model, ranks=[rank]):
            (found,) = traced(model).index[0].T
        sets = zip(chosen[rank - 1], chosen[rank], strict=True)
        assert list(found) == [(set(more) - set(few)).pop() for few, more in sets]


def test_weights_keep_the_sum_that_the_rule_gives_them(model: Any) -> None:
    if not isinstance(getattr(routed_layers(model)[0].router, "norm_topk_prob", True), bool):
        pytest.fail("the rule of this router is not known")
    total = traced(model).weights[0].sum(1)
    with upcycle.override(model, ranks=[2]):
        alone = traced(model).weights[0].sum(1)
    if getattr(routed_layers(model)[0].router, "norm_topk_prob", True):
        assert np.abs(alone - total).max() <= 4 * EPS * total.max()
    else:  # the rule is the plain softmax
        assert (alone < total).all()


def test_an_expert_is_suppressed(model: Any) -> None:
    before = traced(model)
    expert = int(statistics.load(before, 0).argmax())
    with upcycle.override(model, suppress={(0, expert)}) as done:
        after = traced(model)
    assert set(done.changes) == {0}
    load = statistics.load(before, 0)
    load[expert] = 0
    assert (statistics.load(after, 0) == load).all(), "no other expert comes in its place"
    if getattr(routed_layers(model)[0].router, "norm_topk_prob", True):
        others = (before.index[0] != expert) & (before.index[0] >= 0)
        rest = others.any(1)
        sums, sums_before = after.weights[0].sum(1), before.weights[0].sum(1)
        assert np.abs(sums - sums_before)[rest].max(initial=0) <= 4 * EPS * sums_before.max()
        assert not sums[~rest].any()


def test_what_no_token_visits_can_be_suppressed_without_a_trace(ours: Any) -> None:
    before = logits(ours, TOKENS[:, :1])
    load = statistics.load(traced(ours, TOKENS[:, :1]), 0)
    unused = {(0, int(e)) for e in np.flatnonzero(load == 0)}
    assert unused
    with upcycle.override(ours, suppress=unused) as done:
        assert distance(logits(ours, TOKENS[:, :1]), before) <= ROUNDING
    assert done.path == "routed"


def test_without_any_expert_a_layer_adds_nothing(ours: Any) -> None:
    layer = routed_layers(ours)[0]
    x = torch.randn(5, layer.block.experts.hidden_dim)
    with upcycle.override(ours, suppress={(0, e) for e in range(4)}), torch.no_grad():
        assert not layer.block(x).any()


def test_a_factor_of_zero_is_suppression_without_a_new_sum(ours: Any) -> None:
    expert = int(statistics.load(traced(ours), 0).argmax())
    weights = traced(ours).weights[0] * (traced(ours).index[0] != expert)
    with upcycle.override(ours, scale={(0, expert): 0}):
        assert np.array_equal(traced(ours).weights[0], weights)


def test_an_expert_is_forced(model: Any) -> None:
    before = traced(model)
    expert = int(statistics.load(before, 0).argmin())
    with upcycle.override(model, force={(0, expert)}):
        after = traced(model)
    assert (after.index[0] == expert).any(1).all()
    was_there = (before.index[0] == expert).any(1)
    assert np.array_equal(after.index[0][was_there], before.index[0][was_there])
    new = after.index[0][~was_there] == expert
    largest = after.weights[0][~was_there].max(1, keepdims=True)
    assert (after.weights[0][~was_there] == largest)[new].all()


def test_all_experts_of_a_split_are_the_dense_model() -> None:
    model = converted("moefication", {"experts.count": 4, "router.top_k": 2})
    dense = logits(small_models.build("llama"))
    assert distance(logits(model), dense) > 0.01
    with upcycle.override(model, k=4):
        assert distance(logits(model), dense) <= ROUNDING


def test_k_of_one_layer(ours: Any) -> None:
    with upcycle.override(ours, k={1: 3}):
        found = traced(ours)
    assert [index.shape[1] for index in found.index] == [2, 3]
    path = routed_layers(ours)[1].path
    with upcycle.override(ours, k={path: 3}):
        assert np.array_equal(traced(ours).index[1], found.index[1])


def test_experts_change_places(ours: Any) -> None:
    copies = converted("sparse-upcycling")
    for model, moves in ((ours, True), (copies, False)):
        before = logits(model)
        with upcycle.override(model, shuffle=1):
            assert (distance(logits(model), before) > 0.01) == moves


def test_blocks_are_nested_and_leave_nothing_behind(ours: Any) -> None:
    before, hooks = logits(ours), hooks_of(ours)
    (first, *_), (second, *_) = (np.argsort(-statistics.load(traced(ours), n)) for n in (0, 1))
    both = {(0, int(first)), (1, int(second))}
    with upcycle.override(ours, suppress=both, k=3):
        at_once = logits(ours)
    with (
        upcycle.override(ours, suppress={(0, int(first))}),
        upcycle.override(ours, suppress={(1, int(second))}),
        upcycle.override(ours, k=3),
    ):
        assert torch.equal(logits(ours), at_once)
    assert torch.equal(logits(ours), before)
    assert hooks_of(ours) == hooks
    with pytest.raises(ZeroDivisionError), upcycle.override(ours, k=3):
        1 / 0  # noqa: B018
    assert torch.equal(logits(ours), before)


def test_the_innermost_k_counts(ours: Any) -> None:
    with upcycle.override(ours, k=1):
        one = logits(ours)
        with upcycle.override(ours, k=3):
            three = logits(ours)
        assert torch.equal(logits(ours), one)
    with upcycle.override(ours, k=3):
        assert torch.equal(logits(ours), three)


def test_a_trace_sees_what_an_override_around_it_and_in_it_does(ours: Any) -> None:
    with upcycle.override(ours, k=1), upcycle.trace(ours) as seen:
        logits(ours)
    with upcycle.trace(ours) as other, upcycle.override(ours, k=1):
        logits(ours)
    assert seen.result().index[0].shape[1] == 1
    assert np.array_equal(seen.result().index[0], other.result().index[0])


def test_a_block_holds_in_its_own_thread() -> None:
    model = native_moes.native("Mixtral")
    expected = {}
    for k in (1, 2, 3):
        with upcycle.override(model, k=k):
            expected[k] = logits(model)
    found: dict[int, list[bool]] = {k: [] for k in expected}
    together = threading.Barrier(len(expected))

    def run(k: int) -> None:
        with upcycle.override(model, k=k):
            together.wait()
            for _ in range(10):
                found[k].append(torch.equal(logits(model), expected[k]))

    threads = [threading.Thread(target=run, args=(k,)) for k in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [True] * 10 for k in expected}


def test_decoding_routes_as_reading_does(model: Any) -> None:
    """With a cache, token by token, as all at once; under overrides too."""
    for change in ({}, {"k": 1}, {"ranks": [2]}):
        with upcycle.override(model, **change), upcycle.trace(model) as seen:
            text = model.generate(TOKENS[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        with upcycle.override(model, **change):
            whole = traced(model, text[:, :-1])
        steps = seen.result()
        for layer in (0, 1):
            assert np.array_equal(np.sort(steps.index[layer]), np.sort(whole.index[layer]))
            assert (steps.sequence[layer] == 0).all()


def test_padding_leaves_no_trace(ours: Any) -> None:
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    tokens[0, :4], mask[0, :4] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    both = traced(ours, tokens, attention_mask=mask, position_ids=positions)
    alone = [traced(ours, tokens[:1, 4:]), traced(ours, tokens[1:])]
    for layer in (0, 1):
        parts = [trace.index[layer] for trace in alone]
        assert np.array_equal(both.index[layer], np.concatenate(parts))
        assert np.bincount(both.sequence[layer]).tolist() == [5, 9]
    first, second = (set(both.token[layer]) for layer in (0, 1))
    assert first == second


def test_a_trace_survives_its_file(ours: Any, tmp_path: Path) -> None:
    found, path = traced(ours), tmp_path / "t.npz"
    found.save(path)
    again = Trace.load(path)
    assert (again.paths, again.num_experts) == (found.paths, found.num_experts)
    for name in ("index", "weights", "token", "sequence"):
        for a, b in zip(getattr(found, name), getattr(again, name), strict=True):
            assert np.array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("what", ["absent", "text", "cut", "other arrays", "an index too large"])
def test_no_trace_is_refused(what: str, ours: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    found = traced(ours)
    if what == "an index too large":
        found.index[0][0, 0] = 99
    found.save(path)
    data = path.read_bytes()
    if what == "absent":
        path.unlink()
    elif what == "text":
        path.write_text("no zip")
    elif what == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif what == "other arrays":
        np.savez(path, form=1)
    with pytest.raises(UsageError, match="no trace that `upcycle trace` wrote") as error:
        Trace.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "k: 0: "),
        ({"k": 5}, "k: 5: .* has 4 experts; choose 1 to 4"),
        ({"ranks": [5]}, "ranks: 5: "),
        ({"ranks": [1, 1]}, "names one twice"),
        ({"k": 1, "ranks": [1]}, "give one of them"),
        ({"suppress": {(2, 0)}}, "layer 2: the model has 2 MoE layers"),
        ({"force": {(0, 4)}}, "force: .* has no expert 4; choose 0 to 3"),
        ({"scale": {("no.such", 0): 1.0}}, "layer no.such: "),
        ({"k": {7: 1}}, "layer 7: "),
    ],
)
def test_what_is_not_there_is_not_overridden(change: dict[str, Any], said: str, ours: Any) -> None:
    with pytest.raises(UsageError, match=said) as error, upcycle.override(ours, **change):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_dense_and_a_compiled_model_are_refused(ours: Any) -> None:
    dense = small_models.build("llama")
    with pytest.raises(UsageError, match="the model has no MoE layer"), upcycle.trace(dense):
        pass
    compiled = native_moes.native("Mixtral")
    compiled.compile()
    with pytest.raises(UnsupportedError, match="compiled"), upcycle.trace(compiled):
        pass


def test_a_rule_without_a_k_is_refused() -> None:
    all_of_them = {"experts.count": 4, "router.select": "all", "router.top_k": "all"}
    model = converted("split-all", all_of_them)
    with upcycle.override(model, k=2), pytest.raises(UnsupportedError, match="whatever k is"):
        logits(model)
