"""A graph as a file: a picture, a page, or data for other programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx

from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.dot import dot
from upcycle.drawing.draw import html, svg
from upcycle.drawing.labels import clean
from upcycle.errors import UsageError
from upcycle.util.text_file import write_text


def graphml(graph: DiGraph) -> str:
    """The graph in GraphML, which `networkx.read_graphml` and yEd read; its `frames` are JSON."""
    made = DiGraph()
    names = {name: clean(name) for name in graph}
    for name, facts in graph.nodes(data=True):
        made.add_node(names[name], **_plain(facts))
    for source, target, facts in graph.edges(data=True):
        made.add_edge(names[source], names[target], **_plain(facts))
    frames = json.dumps(graph.graph["frames"])
    made.graph.update(_plain({**graph.graph, "frames": frames}))
    return "\n".join(nx.generate_graphml(made)) + "\n"


FORMS: dict[str, Callable[[DiGraph], str]] = {
    ".svg": svg,
    ".html": html,
    ".dot": dot,
    ".graphml": graphml,
}


def check_form(path: str | Path) -> None:
    """Raise UsageError unless the name ends as a graph can be written."""
    if Path(path).suffix.lower() not in FORMS:
        *most, last = FORMS
        raise UsageError(f"{path}: the name of a graph ends in {', '.join(most)} or {last}")


def write_graph(graph: DiGraph, path: str | Path) -> Path:
    """Write what `upcycle.graph` returned, in the form that the name of the file asks for.

    Args:
        graph: what a model does.
        path: ends in ``.svg`` or ``.html`` for a picture, which graphviz lays out where it is
            installed; in ``.dot`` or ``.graphml`` for other programs. What is there is replaced.

    Raises:
        UsageError: the name ends in something else, or nothing can be written there.
    """
    check_form(path)
    write_text(Path(path), FORMS[Path(path).suffix.lower()](graph))
    return Path(path)


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """What GraphML can hold: numbers, and text without control characters."""
    return {name: clean(held) if isinstance(held, str) else held for name, held in facts.items()}
