"""A layer from inside: its operations, and those that they read or are read by."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.layers import LAYER, Facts
from upcycle.drawing.operations import Operation, is_within, shape_facts
from upcycle.drawing.steps import Step
from upcycle.errors import UsageError


def around(operations: Sequence[Operation], layers: Mapping[str, Facts], layer: str) -> DiGraph:
    """The graph of operations in and one step around a layer; a module of several has a frame.

    Args:
        operations: of the whole model.
        layers: what is told of each FFN and MoE layer, by path.
        layer: the path of a module or layer; a pattern such as ``layers.{0..3}.mlp`` is its first.

    Raises:
        UsageError: there is no such layer; the message has the nearest names.
    """
    layer = re.sub(r"\{(\d+)[^}]*\}", r"\1", layer)
    inside = [one for one in operations if layer == one.layer or is_within(one.path, layer)]
    if not layer or not inside:
        raise _unknown(operations, layers, layer)
    names = {one.name for one in inside}
    read = {name for one in inside for name in one.inputs}
    shown = {
        one.name: one
        for one in operations
        if one.name in names | read or not names.isdisjoint(one.inputs)
    }
    frame_of, frames = _frames(inside, layers, layer)
    graph = DiGraph(frames=frames)
    for name, one in shown.items():
        outside = name not in names
        graph.add_node(name, **_facts(one), outside=outside, frame=frame_of.get(name, ""))
        if one.layer is not None and not outside:
            graph.nodes[name]["kind"] = layers[one.layer]["kind"]
    for one in shown.values():
        for name in one.inputs:
            if name in shown and not names.isdisjoint((name, one.name)):
                graph.add_edge(name, one.name, next=False, **shape_facts(shown[name]))
    return graph


def _frames(
    inside: Iterable[Operation], layers: Mapping[str, Facts], layer: str
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The frame of each operation, and all frames: the layer, and the modules in it."""
    is_whole = all(one.layer == layer for one in inside)

    def is_inner(step: Step) -> bool:
        return step[0].startswith(f"{layer}.") or (step[0] == layer and step[1] <= LAYER)

    steps = {
        one.name: [s for s in one.steps if is_inner(s) and not (is_whole and s[0] == layer)]
        for one in inside
    }
    size = Counter(step for found in steps.values() for step in found)
    ids: dict[tuple[Step, ...], str] = {(): "frame"}
    frames: dict[str, dict[str, Any]] = {
        "frame": {**layers.get(layer, {}), "title": layer, "path": layer, "times": 1, "inside": ""}
    }
    frame_of = {}
    for name, found in steps.items():
        key: tuple[Step, ...] = ()
        for step in found:
            if size[step] > 1:
                outer, key = ids[key], (*key, step)
                path = step[0]
                facts = layers.get(path, {}) if step[1] <= LAYER else {}
                place = {"title": path, "path": path, "times": 1, "inside": outer}
                frames.setdefault(ids.setdefault(key, f"frame {len(ids)}"), {**facts, **place})
        frame_of[name] = ids[key]
    return frame_of, frames


def _facts(one: Operation) -> Facts:
    facts: Facts = {
        "kind": "operations" if one.kind == "operation" else one.kind,
        "path": one.path,
        "pattern": one.path,
        "ops": one.op,
        "operations": 1,
        "count": 1,
        **shape_facts(one),
    }
    if one.weights:
        facts["weights"] = sum(size for _, size in one.weights)
        facts["parameters"] = ", ".join(name for name, _ in one.weights)
    if one.source:
        facts["source"] = one.source
    if one.misses:
        facts["miss"] = "\n".join(f"{path or 'the model'}: {why}" for path, why in one.misses)
    return facts


def _unknown(
    operations: Sequence[Operation], layers: Mapping[str, Facts], layer: str
) -> UsageError:
    names = dict.fromkeys(layers)
    for path in dict.fromkeys(one.path for one in operations):
        parts = path.split(".")
        names |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    names.pop("", None)
    near = get_close_matches(layer, names, n=3, cutoff=0.4) or list(names)[:3]
    told = f"; the nearest names are {', '.join(near)}" if near else ", and none with a name"
    return UsageError(f"`around={layer}`: the model runs no such layer{told}")
