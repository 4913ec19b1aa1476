"""Which device holds which experts, so that tokens change devices seldom.

Shape suffixes: L layers, E experts, F experts of the next layer, C devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import coo_array

from upcycle.errors import UsageError
from upcycle.routing import statistics
from upcycle.routing.trace import Trace

SMALL = 4096  # unknowns up to which the best placement is looked for, and SECONDS for it
SECONDS = 20.0
_STARTS, _SWEEPS = 16, 50


@dataclass(frozen=True)
class Placement:
    """The device of every expert.

    Attributes:
        devices: of each layer the device of each expert, [E].
        cost: hops of a token from a layer to the next one, on average over tokens and layers: 0 on
            the same device, 1 on another one, 2 on one of another node.
        contiguous: the same where experts lie in their order, as they do now.
        random: the mean of random placements.
        is_best: no placement costs less.
    """

    devices: tuple[np.ndarray, ...]
    cost: float
    contiguous: float
    random: float
    is_best: bool

    def order(self, layer: int) -> np.ndarray:
        """The experts of `layer` by device, [E]: so renumbered, each device holds a block."""
        return np.argsort(self.devices[layer], kind="stable")


def affinities(trace: Trace) -> "nx.DiGraph[tuple[int, int]]":
    """Experts as ``(layer, expert)``, and the tokens that go from one to one of the next layer."""
    graph: nx.DiGraph[tuple[int, int]] = nx.DiGraph()
    for layer, experts in enumerate(trace.num_experts):
        graph.add_nodes_from((layer, expert) for expert in range(experts))
        if layer + 1 < len(trace.num_experts):
            moved_EF = statistics.transitions(trace, layer)
            for e, f in zip(*np.nonzero(moved_EF), strict=True):
                graph.add_edge((layer, int(e)), (layer + 1, int(f)), tokens=float(moved_EF[e, f]))
    return graph


def place(trace: Trace, devices: int, nodes: int = 1, *, seed: int = 0) -> Placement:
    """Put experts that tokens visit after each other on one device, as many on each.

    Where there are few unknowns the best placement is found by HiGHS; else layer after layer is
    placed best between its neighbours, until nothing changes, from several starts.

    Args:
        devices: C, of which each of `nodes` has as many.
        seed: of the starts, and of the random placements that it is compared with.

    Raises:
        UsageError: the experts or the devices cannot be shared out evenly, or the trace has no
            token that passes two layers.

    Source:
        Yao et al., "ExFlow", 2024, https://arxiv.org/abs/2401.08383
    """
    wrong = next((e for e in trace.num_experts if devices < 2 or e % devices), None)
    if wrong is not None:
        fitting = [c for c in range(2, wrong + 1) if wrong % c == 0]
        raise UsageError(
            f"devices: {devices}: {wrong} experts cannot be shared out evenly to them; choose from "
            f"{', '.join(map(str, fitting))}, or prune to another number of experts first"
        )
    if nodes < 1 or devices % nodes:
        raise UsageError(f"nodes: {nodes}: {devices} devices cannot be shared out evenly to them")
    graph = affinities(trace)
    moved = _matrices(graph, trace.num_experts)
    total = sum(matrix.sum() for matrix in moved)
    if not total:
        raise UsageError("the trace has no token that passes two layers; trace more text")
    hops_CC = _hops(devices, nodes)
    generator = np.random.default_rng(seed)
    straight = [_contiguous(experts, devices) for experts in trace.num_experts]
    drawn = [[generator.permutation(part) for part in straight] for _ in range(_STARTS)]
    tried = [_swept(start, moved, hops_CC, devices) for start in (straight, *drawn)]
    best = min(tried, key=lambda found: _cost(found, moved, hops_CC))
    is_best = _cost(best, moved, hops_CC) == 0
    if not is_best and sum(trace.num_experts) * devices <= SMALL:
        exact = _exact(trace.num_experts, moved, hops_CC)
        if exact is not None:
            best, is_best = min(exact, best, key=lambda found: _cost(found, moved, hops_CC)), True
    return Placement(
        tuple(best),
        _cost(best, moved, hops_CC) / total,
        _cost(straight, moved, hops_CC) / total,
        float(np.mean([_cost(start, moved, hops_CC) for start in drawn])) / total,
        is_best,
    )


def _matrices(graph: "nx.DiGraph[tuple[int, int]]", num_experts: Sequence[int]) -> list[np.ndarray]:
    """The tokens between neighbouring layers, [E, F] each."""
    moved = [np.zeros(pair) for pair in pairwise(num_experts)]
    for (layer, e), (_, f), known in graph.edges(data=True):
        moved[layer][e, f] = known["tokens"]
    return moved


def _hops(devices: int, nodes: int) -> np.ndarray:
    """0 on the diagonal, 1 inside of a node, 2 between nodes, [C, C]."""
    node_C = np.arange(devices) // (devices // nodes)
    hops_CC: np.ndarray = np.where(node_C[:, None] == node_C, 1.0, 2.0)
    np.fill_diagonal(hops_CC, 0)
    return hops_CC


def _contiguous(experts: int, devices: int) -> np.ndarray:
    return np.arange(experts) // (experts // devices)


def _cost(devices: Sequence[np.ndarray], moved: Sequence[np.ndarray], hops_CC: np.ndarray) -> float:
    pairs = zip(pairwise(devices), moved, strict=True)
    return float(sum((hops_CC[here][:, there] * matrix).sum() for (here, there), matrix in pairs))


def _swept(
    start: Sequence[np.ndarray], moved: Sequence[np.ndarray], hops_CC: np.ndarray, devices: int
) -> list[np.ndarray]:
    """Place layer after layer best between its neighbours, until nothing gets better."""
    placed = list(start)
    cost = _cost(placed, moved, hops_CC)
    for _ in range(_SWEEPS):
        for layer in (*range(len(placed)), *reversed(range(len(placed)))):
            cost_EC = np.zeros((len(placed[layer]), devices))
            if layer:
                cost_EC += moved[layer - 1].T @ hops_CC[placed[layer - 1]]
            if layer + 1 < len(placed):
                cost_EC += moved[layer] @ hops_CC[placed[layer + 1]]
            slots = _contiguous(len(cost_EC), devices)
            expert, slot = linear_sum_assignment(cost_EC[:, slots])
            placed[layer] = slots[slot[np.argsort(expert)]]
        now = _cost(placed, moved, hops_CC)
        if now >= cost:
            return placed
        cost = now
    return placed


def _exact(
    num_experts: Sequence[int], moved: Sequence[np.ndarray], hops_CC: np.ndarray
) -> list[np.ndarray] | None:
    """The best placement, or None if `SECONDS` are not enough.

    Unknowns are x[n, c], 1 where expert n of all is on device c, and for each pair of experts with
    tokens between them y >= hops of a pair of devices, if both are taken.
    """
    count = len(hops_CC)
    first = np.concatenate([[0], np.cumsum(num_experts)])
    places = int(first[-1]) * count
    pairs = [
        (int(first[layer] + e), int(first[layer + 1] + f), matrix[e, f])
        for layer, matrix in enumerate(moved)
        for e, f in zip(*np.nonzero(matrix), strict=True)
    ]
    rows: list[tuple[dict[int, float], float, float]] = []
    for n in range(int(first[-1])):
        rows.append(({n * count + c: 1.0 for c in range(count)}, 1, 1))
    for layer, experts in enumerate(num_experts):
        for c in range(count):
            own = {int(first[layer] + e) * count + c: 1.0 for e in range(experts)}
            rows.append((own, experts // count, experts // count))
    for i, (n, m, _) in enumerate(pairs):
        for c in range(count):  # y >= sum over d of hops[c, d] x[m, d], where n is on c
            terms = {m * count + d: -hops_CC[c, d] for d in range(count) if d != c}
            most = float(hops_CC[c].max())
            terms[n * count + c] = -most
            rows.append(({**terms, places + i: 1.0}, -most, np.inf))
    values = [
        (r, column, value) for r, (terms, *_) in enumerate(rows) for column, value in terms.items()
    ]
    row, column, value = (np.array(part) for part in zip(*values, strict=True))
    matrix = coo_array((value, (row, column)), shape=(len(rows), places + len(pairs)))
    objective = np.concatenate([np.zeros(places), [tokens for *_, tokens in pairs]])
    upper = np.concatenate([np.ones(places), np.full(len(pairs), hops_CC.max())])
    found: Any = milp(
        objective,
        integrality=np.concatenate([np.ones(places), np.zeros(len(pairs))]),
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(
            matrix.tocsr(), [low for _, low, _ in rows], [high for *_, high in rows]
        ),
        options={"time_limit": SECONDS},
    )
    if found.status != 0:
        return None
    device = found.x[:places].reshape(-1, count).argmax(1)
    return np.split(device, first[1:-1])
