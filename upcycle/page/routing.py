"""What ``trace.npz`` tells, as heat maps.

Shape suffixes: E experts, F experts of the next layer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upcycle.page.heat import LOAD_STEPS, NEURON_STEPS, HeatMap, heat_map, short_names
from upcycle.routing import statistics
from upcycle.routing.trace import Trace

FILE = "trace.npz"


@dataclass(frozen=True)
class Pairs:
    """A map of the experts of one layer against experts of that layer, or of the next one."""

    title: str
    about: str
    heat: HeatMap


@dataclass(frozen=True)
class Routing:
    """How the tokens of a trace were routed.

    Attributes:
        tokens: in all.
        data: what they are of; empty if that is not known.
        load: a row for each layer; an even share is 1.
        balance: of each layer that tokens reached, with its path.
        pairs: of the layers where experts are tied most.
    """

    tokens: int
    data: str
    load: HeatMap
    balance: tuple[tuple[str, statistics.Balance], ...]
    pairs: tuple[Pairs, ...]


def read_routing(directory: Path) -> Routing | None:
    """The trace in `directory`, or None if there is none.

    Raises:
        UsageError: the file is no trace.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    trace = Trace.load(path)
    layers = [i for i in range(len(trace.paths)) if statistics.load(trace, i).any()]
    if not layers:
        return None
    names = short_names([trace.paths[i] for i in layers])
    balance = [(trace.paths[i], statistics.balance(trace, i)) for i in layers]
    loads = [statistics.load(trace, i).astype(float) for i in layers]
    rows = []
    for name, (path_of, b), load_E in zip(names, balance, loads, strict=True):
        end = f"{load_E.min():.0f} to {load_E.max():.0f}"
        rows.append((name, end, f"{path_of}: {end} tokens per expert, cv {b.cv:.2f}"))
    heat = heat_map([load_E / load_E.mean() for load_E in loads], rows, LOAD_STEPS)
    tokens = max(len(trace.index[i]) for i in layers)
    return Routing(tokens, trace.data, heat, tuple(balance), tuple(_pairs(trace, layers)))


def _pairs(trace: Trace, layers: list[int]) -> list[Pairs]:
    """The layer whose experts are chosen together most, and the two between which tokens keep
    together most."""
    found = []
    together = {i: statistics.coselection(trace, i) for i in layers}
    tied = {i: (matrix - np.eye(len(matrix))).max() for i, matrix in together.items()}
    most = max(tied, key=lambda i: tied[i])
    if tied[most] > 0:
        found.append(
            Pairs(
                f"Chosen together in {trace.paths[most]}",
                "Of the tokens of an expert (row), the part that another (column) gets, too.",
                _square(together[most]),
            )
        )
    following = [i for i in layers if i + 1 in layers and statistics.transitions(trace, i).any()]
    if following:
        moved = {i: statistics.transitions(trace, i) for i in following}
        best = max(moved, key=lambda i: float(moved[i].max(1).sum() / moved[i].sum()))
        found.append(
            Pairs(
                f"From {trace.paths[best]} to {trace.paths[best + 1]}",
                "Of the tokens of an expert (row), the part that goes on to one of the next layer.",
                _square(statistics.affinity(trace, best)),
            )
        )
    return found


def _square(share_EF: np.ndarray) -> HeatMap:
    rows = [
        (
            f"expert {e}",
            f"{row.max():.0%}",
            f"expert {e}: most with {row.argmax()}, {row.max():.0%}",
        )
        for e, row in enumerate(share_EF)
    ]
    return heat_map(list(share_EF), rows, NEURON_STEPS, figures=False)
