"""What rounding to few bits did, as tables."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType

from upcycle.cli.tables import fold, new_table
from upcycle.cli.tables_of_operations import distances, rewritten_json
from upcycle.operations.quantise import Matrix, Rounded
from upcycle.operations.rewritten import Rewritten
from upcycle.util.wording import size


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
    sizes = f"Weights of {size(done.bytes_after)} (before {size(done.bytes_before)})."
    lines: list[RenderableType] = [f"Not rounded: {left}."] if left else []
    return [table, "", *lines, sizes, *distances(done), f"written to {done.out}"]


def _range(parts: Sequence[float]) -> str:
    low, high = (f"{100 * part:.2g}" for part in (min(parts), max(parts)))
    return f"{low} %" if low == high else f"{low} to {high} %"
