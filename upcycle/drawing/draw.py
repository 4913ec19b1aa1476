"""The picture of a graph: SVG, and a page with it in which it is moved and enlarged."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from upcycle.drawing.colours import COLOURS, DARK, kind_of
from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.labels import HEIGHT, PADDING, Line, clean, title_of
from upcycle.drawing.layout import Box, drawn_edges, layout

TEMPLATES = Path(__file__).parent / "templates"
HEAD = 88.0  # pixels above the boxes, for title, legend
NOTE = 16.0
MOST_NOTES = 6
LONGEST = 130  # letters of a note
LEGEND = {
    "ffn": "FFN",
    "bottleneck": "bottleneck (narrower than its input)",
    "head": "head (classifier, pooler)",
    "moe": "mixture of experts",
    "missed": "no FFN, and why",
}


@dataclass(frozen=True)
class Shape:
    """A box or frame as it is drawn."""

    kind: str
    title: str
    box: Box
    texts: list[tuple[float, float, Line]]
    corner: float = 9.0


@dataclass(frozen=True)
class Picture:
    """What the template draws."""

    title: str
    about: str
    head: float
    left: float
    width: float
    height: float
    legend: list[tuple[float, str, str]]
    notes: list[str]
    frames: list[Shape]
    nodes: list[Shape]
    arrows: list[tuple[str, str]]


def picture_of(graph: DiGraph, *, by_graphviz: bool = True, headed: bool = True) -> Picture:
    """Place and describe everything.

    Args:
        graph: as `upcycle.drawing.graph.graph_of` returns it.
        by_graphviz: let ``dot`` place the boxes if it is installed.
        headed: write title and legend above.
    """
    placed = layout(graph, by_graphviz=by_graphviz)
    facts = graph.graph
    nodes = [_node(data, placed.boxes[name]) for name, data in graph.nodes(data=True)]
    kinds = {shape.kind.split()[0] for shape in nodes}
    legend = list(_legend([kind for kind in LEGEND if kind in kinds]))
    notes = [f"no FFN: {clean(text)}" for text in facts["elsewhere"].splitlines()]
    hidden = len(notes) - MOST_NOTES
    notes = notes[:MOST_NOTES] + ([f"and {hidden} more"] if hidden > 0 else [])
    notes = [text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in notes]
    title = clean(facts["title"])
    title = title if len(title) <= LONGEST // 2 else f"…{title[-LONGEST // 2 :]}"
    about = f"{facts['operations']} operations"
    if facts["about"]:
        about = f"{facts['about']}; {about}"
    else:
        about = f"{graph.number_of_nodes()} of {about} of the model"
    texts = [len(title) * 10.5, len(about) * 7.5, legend[-1][0] + 260 if legend else 0]
    texts += [len(note) * 6.6 for note in notes]
    head = HEAD + NOTE * len(notes) if headed else 0.0
    width = max(placed.width, max(texts) + 28) if headed else placed.width
    return Picture(
        title=title,
        about=about,
        head=head,
        left=(width - placed.width) / 2,
        width=width,
        height=placed.height + head,
        legend=legend,
        notes=notes,
        frames=[_frame(facts["frames"][name], box) for name, box in placed.frames.items()],
        nodes=nodes,
        arrows=[(placed.arrows[edge], _tensor(graph.edges[edge])) for edge in drawn_edges(graph)],
    )


def svg(graph: DiGraph) -> str:
    """The graph as an SVG file."""
    return _filled("picture.svg.jinja", graph)


def html(graph: DiGraph) -> str:
    """The graph as a page that loads nothing; its script moves and enlarges the picture."""
    script = (TEMPLATES / "move.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _filled("graph.html.jinja", graph, script=script, digest=digest)


def _filled(template: str, graph: DiGraph, **more: str) -> str:
    page = _environment().get_template(template)
    return page.render(picture=picture_of(graph), colours=COLOURS, dark=DARK, **more)


def _node(facts: Mapping[str, Any], box: Box) -> Shape:
    kind = kind_of(facts)
    if facts.get("outside"):
        kind += " outside"
    is_round = facts["kind"] in ("input", "output") or len(box.lines) == 1
    y = box.y + PADDING / 2 - 4.5
    texts = []
    for line in box.lines:
        y += HEIGHT[line.style]
        texts.append((box.middle, y, line))
    return Shape(kind, title_of(facts), box, texts, 12.0 if is_round else 5.0)


def _frame(facts: Mapping[str, Any], box: Box) -> Shape:
    y = box.y + PADDING / 2 - 2
    texts = []
    for line in box.lines:
        y += HEIGHT[line.style]
        texts.append((box.x + PADDING, y, line))
    return Shape(str(facts.get("kind", "plain")), clean(facts["title"]), box, texts)


def _legend(kinds: list[str]) -> Iterator[tuple[float, str, str]]:
    x = 14.0
    for kind in kinds:
        yield x, kind, LEGEND[kind]
        x += 45 + len(LEGEND[kind]) * 7.2


def _tensor(facts: Mapping[str, Any]) -> str:
    return clean(f"{facts['shape']} {facts['dtype']}") if "shape" in facts else ""


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
