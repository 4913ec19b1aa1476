"""The graph in DOT, the language of graphviz."""

from collections.abc import Iterator, Mapping
from typing import Any

from upcycle.drawing.colours import COLOURS, kind_of
from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.labels import clean, title_of
from upcycle.drawing.layout import boxes_of, drawn_edges, titles_of


def dot(graph: DiGraph) -> str:
    """The text of a ``.dot`` file. Frames are clusters; nodes have their names as identifiers."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: DiGraph) -> Iterator[str]:
    labels = {name: [line.text for line in box.lines] for name, box in boxes_of(graph).items()}
    titles = {name: [line.text for line in box.lines] for name, box in titles_of(graph).items()}
    yield f"digraph {_quoted(graph.graph['title'])} {{"
    yield 'node [shape=box, style=filled, fontname="sans-serif", fontsize=11];'
    yield f'label={_quoted(graph.graph["title"])}; labelloc=t; fontname="sans-serif";'
    yield from _frame(graph, "", labels, titles)
    for source, target in drawn_edges(graph):
        facts = graph.edges[source, target]
        told = f"{facts['shape']} {facts['dtype']}" if "shape" in facts else ""
        yield f"{_quoted(source)} -> {_quoted(target)} [tooltip={_quoted(told)}];"
    yield "}"


def _frame(
    graph: DiGraph,
    frame: str,
    labels: Mapping[str, list[str]],
    titles: Mapping[str, list[str]],
) -> Iterator[str]:
    for name, facts in graph.nodes(data=True):
        if facts["frame"] == frame:
            fill, edge = COLOURS[kind_of(facts)]
            yield (
                f"{_quoted(name)} [label={_quoted(chr(10).join(labels[name]))}, "
                f'fillcolor="{fill}", color="{edge}", tooltip={_quoted(title_of(facts))}];'
            )
    for i, (name, facts) in enumerate(graph.graph["frames"].items()):
        if facts["inside"] == frame:
            yield f"subgraph cluster_{i} {{"
            yield f"label={_quoted(chr(10).join(titles[name]))}; style=dashed; labeljust=l;"
            yield from _frame(graph, name, labels, titles)
            yield "}"


def _quoted(text: Any) -> str:
    """A string of DOT, in which nothing of the text has a meaning."""
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
