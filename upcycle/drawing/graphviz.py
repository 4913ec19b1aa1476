"""A layout by the program ``dot`` of graphviz. No name of the model reaches it."""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.layout import Box, Layout, boxes_of, drawn_edges, titles_of

SECONDS = 30.0
INCH = 72.0  # points, which are pixels here
MARGIN = 12.0


def by_dot(graph: DiGraph, program: str) -> Layout | None:
    """The layout of `program`; None if it fails, or takes too long."""
    boxes, titles = boxes_of(graph), titles_of(graph)
    ids = {name: f"n{i}" for i, name in enumerate(boxes)}
    frame_ids = {name: f"cluster_{i}" for i, name in enumerate(titles)}
    text = "\n".join(_text(graph, boxes, titles, ids, frame_ids))
    try:
        ran = subprocess.run(
            [program, "-Tjson0"], input=text.encode(), capture_output=True, timeout=SECONDS,
            check=True,
        )  # fmt: skip
        return _read(json.loads(ran.stdout), graph, (boxes, titles), (ids, frame_ids))
    except (subprocess.SubprocessError, OSError, ValueError, KeyError):
        return None


def _text(
    graph: DiGraph,
    boxes: dict[str, Box],
    titles: dict[str, Box],
    ids: dict[str, str],
    frame_ids: dict[str, str],
) -> Iterator[str]:
    yield "digraph {"
    yield "graph [rankdir=TB, nodesep=0.3, ranksep=0.35, splines=true];"
    yield 'node [shape=box, fixedsize=true, label=""]; edge [arrowhead=none];'
    yield from _frame(graph, boxes, titles, ids, frame_ids, "")
    for source, target in drawn_edges(graph):
        yield f"{ids[source]} -> {ids[target]};"
    yield "}"


def _frame(
    graph: DiGraph,
    boxes: dict[str, Box],
    titles: dict[str, Box],
    ids: dict[str, str],
    frame_ids: dict[str, str],
    frame: str,
) -> Iterator[str]:
    """What is in a frame: its boxes, and the frames within it with room for their titles."""
    for name, facts in graph.nodes(data=True):
        if facts["frame"] == frame:
            width, height = boxes[name].width / INCH, boxes[name].height / INCH
            yield f"{ids[name]} [width={width:.4f}, height={height:.4f}];"
    for name, facts in graph.graph["frames"].items():
        if facts["inside"] == frame:
            lines = len(titles[name].lines)
            width = int(titles[name].width)
            yield f"subgraph {frame_ids[name]} {{"
            table = f'<TABLE BORDER="0" FIXEDSIZE="TRUE" WIDTH="{width}" HEIGHT="{lines * 17}">'
            yield f"graph [margin=14, label=<{table}<TR><TD></TD></TR></TABLE>>];"
            yield from _frame(graph, boxes, titles, ids, frame_ids, name)
            yield "}"


def _read(
    answer: dict[str, Any],
    graph: DiGraph,
    sized: tuple[dict[str, Box], dict[str, Box]],
    named: tuple[dict[str, str], dict[str, str]],
) -> Layout:
    """The answer in JSON, whose y goes up."""
    left, low, right, high = map(float, answer["bb"].split(","))
    found = {one["name"]: one for one in answer["objects"]}
    numbers = [one["name"] for one in answer["objects"]]

    def place(x: float, y: float) -> tuple[float, float]:
        return round(x - left + MARGIN, 1), round(high - y + MARGIN, 1)

    boxes = {}
    for name, box in sized[0].items():
        x, y = place(*map(float, found[named[0][name]]["pos"].split(",")))
        boxes[name] = Box(x - box.width / 2, y - box.height / 2, box.width, box.height, box.lines)
    frames = {}
    for name, title in sized[1].items():
        a, b, c, d = map(float, found[named[1][name]]["bb"].split(","))
        (x, y), (x2, y2) = place(a, d), place(c, b)
        frames[name] = Box(x, y, x2 - x, y2 - y, title.lines)
    node_of = {short: name for name, short in named[0].items()}
    arrows = {}
    for edge in answer.get("edges", ()):
        points = [
            place(float(x), float(y))
            for x, y in re.findall(
                r"(-?[\d.]+(?:e[-+]?\d+)?),(-?[\d.]+(?:e[-+]?\d+)?)", edge["pos"]
            )
        ]
        ends = tuple(node_of[numbers[edge[end]]] for end in ("tail", "head"))
        start, *rest = [f"{x:g} {y:g}" for x, y in points]
        arrows[ends[0], ends[1]] = f"M{start}C{' '.join(rest)}"
    return Layout(boxes, frames, arrows, right - left + 2 * MARGIN, high - low + 2 * MARGIN)
