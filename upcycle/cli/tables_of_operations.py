"""What operations on a mixture of experts did, as tables."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType

from upcycle.cli.tables import add_rows, fold, new_table
from upcycle.operations.placement import Placement
from upcycle.operations.quantise import Matrix, Rounded
from upcycle.operations.rewritten import Rewritten
from upcycle.util.spans import span
from upcycle.util.wording import size


def rewritten_json(done: Rewritten) -> dict[str, Any]:
    """As plain data."""
    sizes = {"bytes_before": done.bytes_before, "bytes_after": done.bytes_after}
    return {"out": str(done.out), "distance": asdict(done.before), **sizes}


def rewritten_report(done: Rewritten, left: Mapping[str, tuple[int, ...]]) -> list[RenderableType]:
    """The experts that are left, and how far the outputs moved."""
    table = new_table("layer", "experts left")
    add_rows(table, [(path, span(experts)) for path, experts in left.items()])
    return [table, "", *_distance(done), f"written to {done.out}"]


def placement_report(found: Placement, done: Rewritten) -> list[RenderableType]:
    """What the placement costs beside others."""
    table = new_table("placement", "hops of a token, by layer")
    kind = "placed (the best there is)" if found.is_best else "placed"
    table.add_row(kind, f"{found.cost:.3f}")
    table.add_row("contiguous, as before", f"{found.contiguous:.3f}")
    table.add_row("random", f"{found.random:.3f}")
    same = "Every layer computes the same, checked in float64."
    return [table, "", same, *_distance(done), f"written to {done.out}"]


def quantised_json(done: Rewritten, found: Rounded) -> dict[str, Any]:
    """As plain data, with every matrix."""
    rows = [asdict(matrix) for matrix in found.matrices]
    return {**rewritten_json(done), "matrices": rows, "kept": found.kept}


def quantised_report(done: Rewritten, found: Rounded) -> list[RenderableType]:
    """The error of the matrices, those that differ in numbers of their names in one row."""
    table = new_table("matrix", "of them", "shape", "bits", "group", "error", "largest / step")
    alike: dict[tuple[Any, ...], list[Matrix]] = defaultdict(list)
    for matrix in found.matrices:
        alike[re.sub(r"\d+", "#", matrix.name), matrix.shape, matrix.bits].append(matrix)
    for (_, shape, bits), rows in alike.items():
        groups = Counter(row.group for row in rows)
        table.add_row(
            fold([row.name for row in rows]),
            str(len(rows)),
            " x ".join(map(str, shape)),
            str(bits),
            ", ".join(f"{g} ({n})" if len(groups) > 1 else f"{g}" for g, n in groups.items()),
            _range([row.relative for row in rows]),
            f"{max(row.steps for row in rows):.3f}",
        )
    kept = Counter(found.kept.values())
    left = "; ".join(f"{reason} ({number})" for reason, number in kept.items())
    lines: list[RenderableType] = [f"Not rounded: {left}."] if left else []
    return [table, "", *lines, *_distance(done), f"written to {done.out}"]


def _range(parts: Sequence[float]) -> str:
    low, high = (f"{100 * part:.2g}" for part in (min(parts), max(parts)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _distance(done: Rewritten) -> list[RenderableType]:
    before = done.before
    lines: list[RenderableType] = [
        f"Weights of {size(done.bytes_after)} (before {size(done.bytes_before)}).",
        f"Outputs moved by {before.relative:.1e} ({before.inputs}).",
    ]
    words = before.language_model
    if words is not None:
        lines.append(
            f"Perplexity {words.converted_perplexity:.4g} (before {words.dense_perplexity:.4g}), "
            f"the same next word in {words.top1_agreement:.1%} of the places."
        )
    return lines
