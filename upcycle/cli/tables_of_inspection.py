"""What a converted directory holds, and how two directories differ, as tables for people."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from upcycle.cli.tables import add_rows, new_table
from upcycle.targets.provenance_file import runs
from upcycle.util.spans import span
from upcycle.util.wording import count

MAX_ROWS = 24  # of a table that would have one for each expert or tensor
MAX_RUNS = 60  # characters
_NUMBER = re.compile("[0-9]{1,9}")


def converted_report(found: dict[str, Any]) -> list[RenderableType]:
    """What `upcycle.cli.inspection.inspect_converted` found, as tables."""
    written_as = " ".join(filter(None, (found["form"], found["architecture"])))
    head = [
        f"{found['directory']}: {written_as}, {found['dtype']}"
        + "".join(f", {name}" for name in found["onnx"]),
        f"made from {found['model']} by {found['recipe']} (upcycle {found['upcycle']}), "
        f"{found['promise']}",
    ]
    if found["layers"] is None:
        advice = "convert it again to see its layers"
        return [*head, f"no provenance.json: an older upcycle wrote this directory; {advice}"]
    layers = new_table("layer", "experts", "router", "shared", "compensation", "dense neurons")
    add_rows(layers, [_layer(layer) for layer in found["layers"]])
    return [*head, "", layers, "", *_origins(found["layers"])]


def _origins(layers: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    """What the experts are made of."""
    each = [list(_experts(layer)) for layer in layers]
    experts = new_table("layer", "expert", "rows", "dense neurons behind them")
    rows = [row for layer in each for row in layer]
    shown = rows if len(rows) <= MAX_ROWS else each[0][:MAX_ROWS]
    if all([row[1:] for row in layer] == [row[1:] for row in each[0]] for layer in each):
        shown = [row for alike in zip(*each, strict=True) for row in alike]
    add_rows(experts, shown)
    yield experts
    if len(shown) < len(rows) or any("..." in row[3] for row in shown):
        yield "all of them with --json"


def moe_report(found: dict[str, Any]) -> list[RenderableType]:
    """What `upcycle.cli.inspection.inspect_moe` found, as tables."""
    kind = "layers of upcycle" if found["is_own"] else "an architecture of transformers"
    onnx = "".join(f", {name}" for name in found["onnx"])
    layers = new_table("layer", "experts", "top_k", "shared", "router", "d_model")
    add_rows(layers, [_moe_layer(row) for row in found["layers"]])
    unknown = "no report.json: trained since its conversion, or not converted by upcycle"
    return [
        f"{found['directory']}: {found['architecture']} ({kind}), {found['dtype']}{onnx}",
        *(found["told"] or [unknown]),
        "",
        layers,
        f"{count(found['layers'], 'MoE layer')} found",
        *(["", *_origins(found["origins"])] if found["origins"] else []),
    ]


def _moe_layer(row: dict[str, Any]) -> tuple[str, ...]:
    experts = f"{row['num_experts']} of {row['width']}"
    cells = (row["path"], experts, row["top_k"], row["shared"] or "none", row["router"])
    return (*map(str, cells), str(row["d_model"]))


def _layer(layer: dict[str, Any]) -> tuple[str, ...]:
    router = layer["router"]
    select = router["select"]
    more = [f"x {router['scale']:g}"] if router["scale"] != 1 else []
    more += [name for name in ("bias", "tied", "balance") if router[name]]
    chosen = f"{select['rule']} {select['k']}"
    compensation = [f"{key} {value}" for key, value in layer["compensation"].items()]
    return (
        layer["path"],
        f"{layer['experts']} of {layer['width']}, {layer['method']}",
        ", ".join([f"{router['method']} ({router['kind']})", chosen, router["weights"], *more]),
        str(layer["shared"] or "none"),
        ", ".join(compensation) or "none",
        _rows(layer),
    )


def _rows(layer: dict[str, Any]) -> str:
    words = {"padding": "rows of zeros", "drawn_anew": "rows drawn anew"}
    rows = {words.get(key, key.replace("_", " ")): number for key, number in layer["rows"].items()}
    found = [f"{number} {text}" for text, number in rows.items() if number]
    return f"of {layer['dense_neurons']}: {', '.join(found)}"


def _experts(layer: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each run of experts with the same neurons, and one for the shared one."""
    sources = layer["sources"] or [""] * len(layer["expert_rows"])
    both = list(zip(layer["expert_rows"], sources, strict=True))
    for (text, source), group in groupby(range(len(both)), key=lambda e: both[e]):
        experts = list(group)
        name = span(experts)
        name += f" (was {runs(layer['was'][e] for e in experts)})" if layer["was"] else ""
        name += f" from {source}" if source else ""
        yield layer["path"], name, str(layer["width"]), _cut(text)
    if layer["shared"]:
        yield layer["path"], "shared", str(layer["shared"]), _cut(layer["shared_rows"])


def _cut(text: str) -> str:
    if len(text) <= MAX_RUNS:
        return text
    return text[:MAX_RUNS].rpartition(" ")[0] + " ..."


def difference_report(found: dict[str, Any]) -> list[RenderableType]:
    """What `upcycle.cli.difference.difference` found, as tables."""
    parts: list[RenderableType] = []
    if found["config"]:
        config = new_table("configuration", "A", "B")
        add_rows(config, [(r["field"], _value(r["a"]), _value(r["b"])) for r in found["config"]])
        parts += [config, ""]
    by_size = sorted(found["different_tensors"], key=lambda row: -(row["relative"] or 0))
    tensors = new_table("tensor", "largest difference", "of the largest value")
    parts += _first_rows(tensors, [_difference(row) for row in by_size], "tensor")
    for side in ("a", "b"):
        only = new_table(f"only in {side.upper()}", "shape")
        parts += _first_rows(only, _folded(found[f"only_{side}"]), "name")
    different = count(found["different_tensors"], "tensor")
    summary = (
        f"{found['equal_tensors']} tensors equal, {different} different, "
        f"{len(found['only_a'])} only in A, {len(found['only_b'])} only in B; "
        f"{count(found['config'], 'field')} of the configuration different"
    )
    return [*parts, summary, "equal" if found["equal"] else "different"]


def _first_rows(
    table: Table, rows: Sequence[tuple[str, ...]], noun: str
) -> Iterator[RenderableType]:
    """The table with its first rows, and how many more there are; nothing if there are no rows."""
    if rows:
        add_rows(table, rows[:MAX_ROWS])
        yield table
        if len(rows) > MAX_ROWS:
            yield f"and {count(rows[MAX_ROWS:], noun)} more, with --json"
        yield ""


def _folded(tensors: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Names and shapes; names that differ only in numbers, none of them missing, become one."""
    alike: dict[tuple[tuple[str | None, ...], str], list[list[int]]] = {}
    for tensor in tensors:
        parts = tensor["name"].split(".")
        pattern = tuple(None if _NUMBER.fullmatch(part) else part for part in parts)
        numbers = [int(part) for part, text in zip(parts, pattern, strict=True) if text is None]
        alike.setdefault((pattern, str(tensor["shape"])), []).append(numbers)
    rows: list[tuple[str, ...]] = []
    for (pattern, shape), found in alike.items():
        seen = [sorted(set(column)) for column in zip(*found, strict=True)]
        is_whole = math.prod(len(column) for column in seen) == len(found)
        if is_whole and all(column[-1] - column[0] < len(column) for column in seen):
            spans = [f"{{{span(c)}}}" if len(c) > 1 else f"{c[0]}" for c in seen]
            rows.append((_filled(pattern, spans), shape))
        else:
            rows += [(_filled(pattern, map(str, numbers)), shape) for numbers in found]
    return rows


def _filled(pattern: tuple[str | None, ...], numbers: Iterable[str]) -> str:
    following = iter(numbers)
    return ".".join(next(following) if part is None else part for part in pattern)


def _difference(row: dict[str, Any]) -> tuple[str, ...]:
    if row["max"] is None:
        return row["name"], "shapes {} and {}".format(*row["shapes"]), ""
    dtypes = "" if row["dtypes"][0] == row["dtypes"][1] else " ({} and {})".format(*row["dtypes"])
    return row["name"], f"{row['max']:.3g}{dtypes}", f"{row['relative']:.2e}"


def _value(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= MAX_RUNS else text[:MAX_RUNS] + "..."
