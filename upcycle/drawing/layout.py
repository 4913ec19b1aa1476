"""Where everything is in a picture: the data, and the choice of who places it."""

import logging
import shutil
from dataclasses import dataclass

from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.labels import HEIGHT, PADDING, Line, frame_words, lines_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Box:
    """A rectangle with text: a node or a frame. `x` and `y` are its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    lines: tuple[Line, ...] = ()

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y + self.height

    @property
    def middle(self) -> float:
        """Half-way from left to right."""
        return self.x + self.width / 2

    @property
    def center(self) -> float:
        """Half-way down."""
        return self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """A picture in pixels, from (0, 0) on.

    Attributes:
        boxes: by node.
        frames: by key; the outer ones first.
        arrows: source and target -> the path in the language of SVG.
        width, height: of all of it.
    """

    boxes: dict[str, Box]
    frames: dict[str, Box]
    arrows: dict[tuple[str, str], str]
    width: float
    height: float


def box_of(lines: list[Line]) -> Box:
    """A box that is as large as its text needs, at no place yet."""
    width = max((line.width for line in lines), default=0.0) + 2 * PADDING
    height = sum(HEIGHT[line.style] for line in lines) + PADDING
    return Box(0.0, 0.0, max(width, 34.0), height, tuple(lines))


def boxes_of(graph: DiGraph) -> dict[str, Box]:
    """The box of each node, at no place yet."""
    frames = graph.graph["frames"]
    return {
        name: box_of(lines_of(facts, frames.get(facts["frame"], {})))
        for name, facts in graph.nodes(data=True)
    }


def titles_of(graph: DiGraph) -> dict[str, Box]:
    """The box of the title of each frame, at no place yet; the outer frames first."""
    frames = graph.graph["frames"]
    return {
        name: box_of(frame_words(facts, frames.get(facts["inside"], {})))
        for name, facts in frames.items()
    }


def drawn_edges(graph: DiGraph) -> list[tuple[str, str]]:
    """The arrows of a picture: those to the next repeat are left out, as its frame says it."""
    return [(a, b) for a, b, facts in graph.edges(data=True) if not facts["next"]]


def layout(graph: DiGraph, *, by_graphviz: bool = True) -> Layout:
    """Place the boxes of `graph` by graphviz's ``dot`` if that is installed, or else in rows.

    Args:
        graph: as `upcycle.drawing.graph.graph_of` returns it.
        by_graphviz: ask for ``dot`` at all.
    """
    from upcycle.drawing.graphviz import by_dot
    from upcycle.drawing.rows import by_rows

    program = shutil.which("dot") if by_graphviz else None
    if program is not None:
        placed = by_dot(graph, program)
        if placed is not None:
            return placed
        log.warning("graphviz's dot gave no layout; the boxes are placed without it")
    return by_rows(graph)
