"""A layout in rows: what depends on nothing first, what depends on it below. No program is needed.

Each frame is laid out by itself and is one box in the rows around it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.layout import Box, Layout, boxes_of, drawn_edges, titles_of

GAP = 22.0  # between boxes of a row
ROW_GAP = 28.0
MARGIN = 14.0
LANE = 11.0  # between arrows that go around boxes
NEAR = 10.0  # how far below or above a box an arrow turns

Edge = tuple[str, str]


@dataclass(frozen=True)
class _Block:
    """Boxes and frames, placed beside each other from (0, 0) on."""

    boxes: dict[str, Box]
    frames: dict[str, Box]
    width: float
    height: float

    def moved(self, x: float, y: float) -> "_Block":
        """All of it at another place."""
        boxes, frames = (
            {name: replace(box, x=box.x + x, y=box.y + y) for name, box in all_of.items()}
            for all_of in (self.boxes, self.frames)
        )
        return replace(self, boxes=boxes, frames=frames)


def by_rows(graph: DiGraph) -> Layout:
    """The layout of `graph`, the same for the same graph."""
    placed = _block(graph, boxes_of(graph), titles_of(graph), "").moved(MARGIN, MARGIN)
    edges = drawn_edges(graph)
    lanes = _lanes(placed.boxes, edges)
    left = min([0.0, *(lane - MARGIN for lane in lanes.values())])
    right = max([placed.width + 2 * MARGIN, *(lane + MARGIN for lane in lanes.values())])
    placed = placed.moved(-left, 0.0)
    arrows = {
        edge: _around(placed.boxes, edge, lanes[edge] - left)
        if edge in lanes
        else _down(placed.boxes, edge)
        for edge in edges
    }
    height = placed.height + 2 * MARGIN
    return Layout(placed.boxes, placed.frames, arrows, right - left, height)


def _block(graph: DiGraph, boxes: dict[str, Box], titles: dict[str, Box], frame: str) -> _Block:
    """What is in a frame, in rows."""
    parts: dict[str, _Block] = {}
    part_of: dict[str, str] = {}
    for name, facts in graph.nodes(data=True):
        chain = _chain(graph, facts["frame"])
        if frame and frame not in chain:
            continue
        depth = chain.index(frame) if frame else len(chain)
        inner = chain[depth - 1] if depth else ""
        part_of[name] = f"frame:{inner}" if inner else f"box:{name}"
        if part_of[name] not in parts:
            parts[part_of[name]] = (
                _framed(graph, boxes, titles, inner)
                if inner
                else _Block({name: boxes[name]}, {}, boxes[name].width, boxes[name].height)
            )
    order = {part: i for i, part in enumerate(parts)}
    between = DiGraph()
    between.add_nodes_from(parts)
    between.add_edges_from(
        (part_of[a], part_of[b])
        for a, b in drawn_edges(graph)
        if a in part_of and b in part_of and order[part_of[a]] < order[part_of[b]]
    )
    rows = [sorted(row, key=order.__getitem__) for row in nx.topological_generations(between)]
    return _stacked(rows, parts, between)


def _chain(graph: DiGraph, frame: str) -> list[str]:
    """The frames around a node, the innermost first."""
    chain = []
    while frame:
        chain.append(frame)
        frame = graph.graph["frames"][frame]["inside"]
    return chain


def _framed(graph: DiGraph, boxes: dict[str, Box], titles: dict[str, Box], frame: str) -> _Block:
    """A frame with its title above what is in it."""
    title = titles[frame]
    inner = _block(graph, boxes, titles, frame)
    width = max(inner.width + 2 * MARGIN, title.width)
    moved = inner.moved((width - inner.width) / 2, title.height + MARGIN / 2)
    height = inner.height + title.height + 1.5 * MARGIN
    around = replace(title, width=width, height=height)
    return _Block(moved.boxes, {frame: around, **moved.frames}, width, height)


def _stacked(rows: list[list[str]], parts: dict[str, _Block], between: DiGraph) -> _Block:
    """Rows below each other, each in the middle; on the right is room for arrows around boxes."""
    middle: dict[str, float] = {}
    boxes: dict[str, Box] = {}
    frames: dict[str, Box] = {}
    widest = max((_width(row, parts) for row in rows), default=0.0)
    y = 0.0
    for row in rows:
        before = {
            part: [middle[p] for p in between.predecessors(part)] or [widest / 2] for part in row
        }
        row.sort(key=lambda part: sum(before[part]) / len(before[part]))
        x = (widest - _width(row, parts)) / 2
        height = max(parts[part].height for part in row)
        for part in row:
            block = parts[part].moved(x, y + (height - parts[part].height) / 2)
            boxes |= block.boxes
            frames |= block.frames
            middle[part] = x + block.width / 2
            x += block.width + GAP
        y += height + ROW_GAP
    row_of = {part: i for i, row in enumerate(rows) for part in row}
    skips = sum(row_of[b] - row_of[a] > 1 for a, b in between.edges)
    return _Block(boxes, frames, widest + LANE * skips, max(y - ROW_GAP, 0.0))


def _width(row: Iterable[str], parts: dict[str, _Block]) -> float:
    widths = [parts[part].width for part in row]
    return sum(widths) + GAP * (len(widths) - 1)


def _lanes(boxes: Mapping[str, Box], edges: Sequence[Edge]) -> dict[Edge, float]:
    """The edges that go around boxes, and where beside these they do; short ones are nearer."""
    taken: list[tuple[float, float, float]] = []  # from y to y, at x
    lanes: dict[Edge, float] = {}
    for edge in sorted(edges, key=lambda edge: abs(boxes[edge[0]].y - boxes[edge[1]].y)):
        a, b = boxes[edge[0]], boxes[edge[1]]
        top, bottom = min(a.y, b.y), max(a.bottom, b.bottom)
        near = [box for box in boxes.values() if box.y < bottom and box.bottom > top]
        if b.y > a.bottom and not _meets(a, b, [box for box in near if box not in (a, b)]):
            continue
        blocked = {side: [_is_blocked(end, side, near) for end in (a, b)] for side in (1.0, -1.0)}
        side = -1.0 if all(blocked[1.0]) and not any(blocked[-1.0]) else 1.0
        outer = max(box.right for box in near) if side > 0 else -min(box.x for box in near)
        x = outer + LANE  # to the left it counts from right to left
        span = (min(a.center, b.center), max(a.center, b.center))
        for start, stop, other in sorted(taken, key=lambda lane: lane[2] * side):
            if start < span[1] and stop > span[0] and abs(other * side - x) < LANE:
                x = other * side + LANE
        taken.append((*span, x * side))
        lanes[edge] = x * side
    return lanes


def _is_blocked(end: Box, side: float, boxes: Iterable[Box]) -> bool:
    """Whether a box is on the right (1) or left (-1) of the middle of another."""
    return any(
        box is not end and box.y < end.center < box.bottom and (box.x - end.x) * side > 0
        for box in boxes
    )


def _meets(a: Box, b: Box, others: Iterable[Box]) -> bool:
    """Whether the curve from the bottom of `a` to the top of `b` goes through another box."""
    for step in range(1, 16):
        t = step / 16
        x = a.middle + (b.middle - a.middle) * t * t * (3 - 2 * t)  # as the curve of `_down`
        y = a.bottom + (b.y - a.bottom) * (1.5 * t * (1 - t) + t**3)
        if any(box.x < x < box.right and box.y < y < box.bottom for box in others):
            return True
    return False


def _down(boxes: Mapping[str, Box], edge: Edge) -> str:
    a, b = boxes[edge[0]], boxes[edge[1]]
    half = (a.bottom + b.y) / 2
    return (
        f"M{a.middle:.1f} {a.bottom:.1f}C{a.middle:.1f} {half:.1f} {b.middle:.1f} {half:.1f} "
        f"{b.middle:.1f} {b.y:.1f}"
    )


def _around(boxes: Mapping[str, Box], edge: Edge, x: float) -> str:
    """Out of the side of a box, along the lane at `x`, and into the side of the other.

    Where another box is beside one, its lower edge is the way out, and its upper edge the way in.
    """
    a, b = boxes[edge[0]], boxes[edge[1]]
    side = 1.0 if x > max(a.middle, b.middle) else -1.0
    points = [(x, 0.0), (x, 0.0)]
    if _is_blocked(a, side, boxes.values()):
        y = a.bottom + NEAR
        points[:1] = [(a.middle, a.bottom), (a.middle, y), (x, y)]
    else:
        points[:1] = [(a.right if side > 0 else a.x, a.center), (x, a.center)]
    if _is_blocked(b, side, boxes.values()):
        y = b.y - NEAR
        points[-1:] = [(x, y), (b.middle, y), (b.middle, b.y)]
    else:
        points[-1:] = [(x, b.center), (b.right if side > 0 else b.x, b.center)]
    return _rounded(points)


def _rounded(points: Sequence[tuple[float, float]]) -> str:
    """A line along the axes through `points`, with round corners."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        start, stop = _towards(here, before), _towards(here, after)
        parts.append(f"L{start}Q{here[0]:.1f} {here[1]:.1f} {stop}")
    return "".join(parts) + f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"


def _towards(point: tuple[float, float], other: tuple[float, float]) -> str:
    """Some pixels from a point to another, which is beside, above or below it."""
    (x, y), (to_x, to_y) = point, other
    most = min(5.0, max(abs(to_x - x), abs(to_y - y)) / 2)
    step = [math.copysign(most, d) if d else 0.0 for d in (to_x - x, to_y - y)]
    return f"{x + step[0]:.1f} {y + step[1]:.1f}"
