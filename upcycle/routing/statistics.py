"""What a trace tells about the experts.

Shape suffixes: T tokens, E experts, F experts of the next layer, K chosen experts at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upcycle.errors import UsageError
from upcycle.routing.trace import Trace


def visits(trace: Trace, layer: int, *, weighted: bool = False) -> np.ndarray:
    """How much each token visits each expert, [T, E]: 1 or 0, or the weight."""
    index_TK, weights_TK = trace.index[layer], trace.weights[layer]
    visits_TE = np.zeros((len(index_TK), trace.num_experts[layer]))
    token, slot = np.nonzero(index_TK >= 0)
    values = weights_TK[token, slot] if weighted else 1.0
    np.add.at(visits_TE, (token, index_TK[token, slot]), values)
    return visits_TE


def load(trace: Trace, layer: int) -> np.ndarray:
    """How many tokens visit each expert, [E]."""
    index = trace.index[layer]
    return np.bincount(index[index >= 0], minlength=trace.num_experts[layer])


@dataclass(frozen=True)
class Balance:
    """How evenly the experts of a layer are visited; names and formulas of NeMo Automodel.

    Attributes:
        tokens: T.
        experts_per_token: the mean number of experts that a token visits.
        cv: the standard deviation of the loads of the experts, by their mean.
        utilization_min, utilization_max: the load of an expert by the mean load.
        dead_expert_frac: the part of the experts that no token visits.
        expert_diversity: exp(H) / E of the entropy H of the loads: 1 if all are equal.
    """

    tokens: int
    experts_per_token: float
    cv: float
    utilization_min: float
    utilization_max: float
    dead_expert_frac: float
    expert_diversity: float


def balance(trace: Trace, layer: int) -> Balance:
    """How evenly the experts of `layer` are visited.

    Raises:
        UsageError: no token reached the layer.
    """
    load_E = load(trace, layer)
    tokens = len(trace.index[layer])
    if not load_E.any():
        raise UsageError(f"{trace.paths[layer]}: no token in the trace visits one of its experts")
    share_E = load_E / load_E.sum()
    used = share_E[share_E > 0]
    diversity = float(np.exp(-(used * np.log(used)).sum()) / len(share_E))
    utilization_E = share_E * len(share_E)
    return Balance(
        tokens,
        float(load_E.sum() / tokens),
        float(utilization_E.std()),
        float(utilization_E.min()),
        float(utilization_E.max()),
        float((load_E == 0).mean()),
        diversity,
    )


def coselection(trace: Trace, layer: int) -> np.ndarray:
    """Of the tokens that visit expert e, the part that also visits f, [E, E]; 1 for e = f.

    Rows of experts that nobody visits are zero (the cooperation of experts of Lu et al.,
    "Dynamic-DINO", 2025, https://arxiv.org/abs/2507.17436).
    """
    visits_TE = visits(trace, layer)
    together_EE = visits_TE.T @ visits_TE
    count_E1 = np.diag(together_EE)[:, None]
    return _divided(together_EE, count_E1)


def transitions(trace: Trace, layer: int) -> np.ndarray:
    """What tokens carry from the experts of `layer` to those of the next one, [E, F].

    A token spreads its 1 over all pairs, by the products of its weights, so that for one expert a
    token these are counts. Tokens that are in one of the two layers only do not count.
    """
    _, here, there = np.intersect1d(trace.token[layer], trace.token[layer + 1], return_indices=True)
    parts = []
    for number, rows in ((layer, here), (layer + 1, there)):
        weights_TE = np.abs(visits(trace, number, weighted=True)[rows])
        total_T1 = weights_TE.sum(1, keepdims=True)
        parts.append(_divided(weights_TE, total_T1))
    moved_EF: np.ndarray = parts[0].T @ parts[1]
    return moved_EF


def affinity(trace: Trace, layer: int) -> np.ndarray:
    """The part of the tokens of expert e of `layer` that goes on to f of the next one, [E, F].

    (Yao et al., "ExFlow", 2024, https://arxiv.org/abs/2401.08383)
    """
    moved_EF = transitions(trace, layer)
    total_E1 = moved_EF.sum(1, keepdims=True)
    return _divided(moved_EF, total_E1)


def _divided(array: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Zero where it is divided by zero."""
    found: np.ndarray = np.divide(array, by, out=np.zeros_like(array), where=by > 0)
    return found


def activations(trace: Trace, layer: int, *, weighted: bool = False) -> np.ndarray:
    """How often, or how strongly, the tokens of each sequence visit each expert, [sequences, E]."""
    sequence_T = trace.sequence[layer]
    sums = np.zeros((int(sequence_T.max(initial=-1)) + 1, trace.num_experts[layer]))
    np.add.at(sums, sequence_T, visits(trace, layer, weighted=weighted))
    return sums


@dataclass(frozen=True)
class Resonance:
    """How many tokens more of a sequence of a class visit an expert than of another sequence."""

    layer: int
    expert: int
    value: float


def resonance(trace: Trace, classes: Sequence[str], of: str) -> list[Resonance]:
    """The experts of all layers, the one that resonates most with the class `of` first.

    The activation of an expert by a sequence is the number of its tokens that visit it; the
    resonance is the mean over the sequences of the class, without that over the others (functional
    token resonance imaging of Dahlke et al., "MoTE", 2025, https://arxiv.org/abs/2502.11096).

    Args:
        classes: of each sequence of the trace, in order.

    Raises:
        UsageError: a class is missing, or the numbers differ.
    """
    is_in = np.array([name == of for name in classes])
    if is_in.all() or not is_in.any():
        raise UsageError(f"resonance needs sequences of {of} and others, and has one kind only")
    found = []
    for layer in range(len(trace.paths)):
        sums = activations(trace, layer)
        if len(sums) > len(classes):
            raise UsageError(
                f"the trace has {len(sums)} sequences, and there are {len(classes)} classes"
            )
        sums = np.pad(sums, ((0, len(classes) - len(sums)), (0, 0)))
        difference_E = sums[is_in].mean(0) - sums[~is_in].mean(0)
        found += [Resonance(layer, e, float(d)) for e, d in enumerate(difference_E)]
    return sorted(found, key=lambda r: -r.value)
