"""Choose the experts that a task needs.

Shape suffixes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from upcycle.errors import UsageError
from upcycle.routing.statistics import visits
from upcycle.routing.trace import Trace

By = Literal["tokens", "gate"]


@dataclass(frozen=True)
class Chosen:
    """The experts of one layer.

    Attributes:
        experts: their numbers, the most needed first.
        share: what all of them have of the score of the layer, 0 to 1.
    """

    path: str
    experts: tuple[int, ...]
    share: float


def choose(trace: Trace, p: float = 0.2, *, by: By = "tokens") -> list[Chosen]:
    """The fewest experts of each layer that have the share `p` of its score on the traced data.

    The score of an expert is its share of the visits (``tokens``) or of the weights (``gate``), so
    those of a layer sum to one.

    Raises:
        UsageError: `p` is no share, or the trace has no token in a layer.

    Source:
        Wang et al., "Expert-Specialized Fine-Tuning", 2024, https://arxiv.org/abs/2407.01906
    """
    if not 0 < p <= 1:
        raise UsageError(f"p: {p} is no share; choose one above 0 and up to 1")
    found = []
    for layer, path in enumerate(trace.paths):
        score_E = visits(trace, layer, weighted=by == "gate").sum(0)
        if not score_E.sum() > 0:
            raise UsageError(f"{path}: the trace has no token that visits an expert of it")
        share_E = score_E / score_E.sum()
        order = np.argsort(-share_E, kind="stable")
        total = np.cumsum(share_E[order])
        # Without the slack rounding could ask for one more where the shares are exactly `p`.
        count = int(np.searchsorted(total, p - 1e-9)) + 1
        found.append(Chosen(path, tuple(map(int, order[:count])), float(total[count - 1])))
    return found
