"""What a trace tells, as tables.

Shape suffixes: E experts, F experts of the next layer.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import RenderableType

from upcycle.cli.tables import add_rows, new_table
from upcycle.routing import statistics
from upcycle.routing.trace import Trace

_MOST = 5  # pairs, and resonating experts of a class


def routing_json(trace: Trace) -> dict[str, Any]:
    """Everything that `routing_report` shows, and the matrices behind it."""
    layers = []
    for layer, path in enumerate(trace.paths):
        found: dict[str, Any] = {"path": path, "load": statistics.load(trace, layer).tolist()}
        if sum(found["load"]):
            found |= asdict(statistics.balance(trace, layer))
            found["coselection"] = statistics.coselection(trace, layer).tolist()
            if layer + 1 < len(trace.paths):
                found["affinity_to_next"] = statistics.affinity(trace, layer).tolist()
        layers.append(found)
    resonances = {
        name: [asdict(found) for found in statistics.resonance(trace, trace.classes, name)[:50]]
        for name in _kinds(trace)
    }
    return {"data": trace.data, "layers": layers, "resonance": resonances}


def routing_report(trace: Trace) -> list[RenderableType]:
    """Load and balance of each layer, who is chosen with whom, where tokens go, and by class."""
    table = new_table(
        *("layer", "tokens", "experts per token", "cv", "utilization", "dead_expert_frac"),
        *("expert_diversity", "most", "least", "most together", "stays on its way"),
    )
    rows = []
    for layer, path in enumerate(trace.paths):
        if not statistics.load(trace, layer).any():
            rows.append((path, "0", *[""] * 9))
            continue
        share_E = statistics.load(trace, layer) / statistics.load(trace, layer).sum()
        b = statistics.balance(trace, layer)
        rows.append(
            (
                path,
                str(b.tokens),
                f"{b.experts_per_token:.2f}",
                f"{b.cv:.2f}",
                f"{b.utilization_min:.2f} to {b.utilization_max:.2f}",
                f"{b.dead_expert_frac:.2f}",
                f"{b.expert_diversity:.2f}",
                f"{share_E.argmax()}: {share_E.max():.0%}",
                f"{share_E.argmin()}: {share_E.min():.1%}",
                _together(trace, layer),
                _on_its_way(trace, layer),
            )
        )
    add_rows(table, rows)
    parts: list[RenderableType] = [table]
    if trace.data:
        parts.append(f"counted on {trace.data}")
    for name in _kinds(trace):
        found = statistics.resonance(trace, trace.classes, name)[:_MOST]
        found = [one for one in found if one.value > 0]
        kinds = new_table("layer", "expert", f"tokens of a sequence more, {name}")
        for one in found:
            kinds.add_row(trace.paths[one.layer], str(one.expert), f"{one.value:.1f}")
        parts += ["", kinds]
    if not trace.classes:
        parts += ["", "Several texts (--text A --text B) would tell which experts are of which."]
    return parts


def _kinds(trace: Trace) -> list[str]:
    kinds = sorted(set(trace.classes))
    return kinds if len(kinds) > 1 else []


def _together(trace: Trace, layer: int) -> str:
    """The pair of experts that is most often chosen together, and how often."""
    shared_EE = statistics.coselection(trace, layer)
    np.fill_diagonal(shared_EE, -1)
    first, second = np.unravel_index(shared_EE.argmax(), shared_EE.shape)
    value = shared_EE[first, second]
    return f"{first} with {second}: {value:.0%}" if value > 0 else "none"


def _on_its_way(trace: Trace, layer: int) -> str:
    """The part of the tokens that go the way most of their expert's tokens go."""
    if layer + 1 == len(trace.paths):
        return ""
    moved_EF = statistics.transitions(trace, layer)
    total = moved_EF.sum()
    if not total:
        return ""
    chance = moved_EF.sum(0).max() / total
    return f"{moved_EF.max(1).sum() / total:.0%} (chance {chance:.0%})"
