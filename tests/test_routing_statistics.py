"""What a trace tells about the experts, on traces whose answers are known.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

import numpy as np
import pytest
import small_models
import torch

import upcycle
from upcycle.errors import UsageError
from upcycle.routing import statistics
from upcycle.routing.trace import Trace


def made(*index: list[list[int]], experts: int = 4, sequence: list[int] | None = None) -> Trace:
    """A trace of layers with these visits, all of one weight."""
    arrays = tuple(np.array(layer, dtype=np.int32) for layer in index)
    weights = tuple(np.where(layer >= 0, 1.0, 0.0).astype(np.float32) for layer in arrays)
    tokens = tuple(np.arange(len(layer)) for layer in arrays)
    sequences = tuple(np.array(sequence or [0] * len(layer)) for layer in arrays)
    paths = tuple(f"layers.{i}" for i in range(len(index)))
    return Trace(paths, (experts,) * len(index), arrays, weights, tokens, sequences)


def test_even_loads() -> None:
    found = statistics.balance(made([[0, 1], [2, 3]]), 0)
    assert (found.tokens, found.experts_per_token) == (2, 2)
    assert (found.cv, found.dead_expert_frac) == (0, 0)
    assert (found.utilization_min, found.utilization_max) == (1, 1)
    assert found.expert_diversity == pytest.approx(1, rel=0, abs=4 * np.finfo(float).eps)


def test_one_expert_gets_everything() -> None:
    found = statistics.balance(made([[2, -1], [2, -1], [2, -1]]), 0)
    assert found.experts_per_token == 1
    assert (found.cv, found.dead_expert_frac) == (np.sqrt(3), 0.75)
    assert (found.utilization_min, found.utilization_max) == (0, 4)
    assert found.expert_diversity == 0.25


def test_a_layer_that_no_token_reached_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layers\.0: no token"):
        statistics.balance(made([[-1]]), 0)


def test_who_is_chosen_with_whom() -> None:
    found = statistics.coselection(made([[0, 1], [0, 2], [1, -1]]), 0)
    expected = [[1, 0.5, 0.5, 0], [0.5, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert found.tolist() == expected


def test_slices_of_one_copy_are_always_together() -> None:
    dense = small_models.build("llama")
    sets = ["experts.count=8", "layers.skip_first=0"]
    model = upcycle.convert(dense, "dynamic-dino", overrides=sets).model.eval()
    with upcycle.trace(model) as seen, torch.no_grad():
        model(input_ids=torch.randint(3, 90, (4, 16)))
    trace = seen.result()
    found = statistics.coselection(trace, 0)
    visited = np.flatnonzero(statistics.load(trace, 0))
    assert len(visited) >= 2
    assert trace.index[0].shape[1] == 2, "a token visits the slices of one copy"
    assert set(found[visited].ravel()) == {0.0, 1.0}
    assert (found[visited].sum(1) == 2).all()


def test_where_tokens_go_next() -> None:
    trace = made([[0], [0], [1], [2]], [[3], [2], [1], [1]])
    moved = statistics.transitions(trace, 0)
    assert moved.sum() == 4
    assert statistics.affinity(trace, 0).tolist() == [
        [0, 0, 0.5, 0.5],
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_a_token_counts_once_however_many_experts_it_visits() -> None:
    trace = made([[0, 1]], [[2, 3]])
    assert statistics.transitions(trace, 0).tolist() == [
        [0, 0, 0.25, 0.25],
        [0, 0, 0.25, 0.25],
        [0] * 4,
        [0] * 4,
    ]


def test_tokens_of_one_layer_only_do_not_count() -> None:
    trace = made([[0], [1]], [[2], [3]])
    other = Trace(*(*_but(trace, "token"), (np.array([0, 1]), np.array([1, 2])), trace.sequence))
    assert statistics.transitions(other, 0).sum() == 1
    assert statistics.transitions(other, 0)[1, 2] == 1


def _but(trace: Trace, name: str) -> list[object]:
    names = ["paths", "num_experts", "index", "weights"]
    assert name not in names
    return [getattr(trace, other) for other in names]


def test_the_expert_of_a_class_resonates_with_it() -> None:
    """Class a visits expert 3 of the first layer, all else is the same for both."""
    sequence = [0, 0, 1, 1, 2, 2]
    trace = made([[3], [3], [0], [0], [3], [0]], [[1]] * 6, sequence=sequence)
    of_a = statistics.resonance(trace, ["a", "b", "a"], "a")
    of_b = statistics.resonance(trace, ["a", "b", "a"], "b")
    assert (of_a[0].layer, of_a[0].expert, of_a[0].value) == (0, 3, 1.5)
    assert (of_b[0].layer, of_b[0].expert) == (0, 0)
    values = {(r.layer, r.expert): r.value for r in of_a}
    assert all(values[r.layer, r.expert] == -r.value for r in of_b)


@pytest.mark.parametrize("classes", [["a", "a"], ["b", "b"], ["a"]])
def test_classes_must_be_two_and_as_many_as_sequences(classes: list[str]) -> None:
    with pytest.raises(UsageError):
        statistics.resonance(made([[0], [1]], sequence=[0, 1]), classes, "a")
