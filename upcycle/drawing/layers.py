"""Which operations belong to an FFN or to an MoE layer, and which show why there is no FFN."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from upcycle.capture.recorder import Program
from upcycle.drawing.operations import Operation, operations_of
from upcycle.drawing.steps import Step
from upcycle.ir.ffn import FFN, Located, Miss
from upcycle.models.moe_layers import moe_layers
from upcycle.passes.locate.hidden_tensor import NotAnFFNError
from upcycle.passes.locate.linear import computed_linear, grouped_linear, linear_map
from upcycle.passes.locate.region import output_of
from upcycle.passes.locate.trace import trace

Facts = dict[str, Any]  # of a layer: names, and numbers or words
LAYER = -1  # a step into a layer, and not into a call of its module, has this number or a lower one


def ffn_facts(ffn: FFN) -> Facts:
    """What a picture tells of an FFN."""
    return {
        "kind": ffn.kind,
        "d_model": ffn.d_model,
        "d_ff": ffn.d_ff,
        "d_out": ffn.d_out,
        "expansions": len(ffn.expansions),
        "activation": ffn.pointwise.name,
        "placement": ffn.placement,
    }


def moe_facts(model: nn.Module) -> dict[str, Facts]:
    """What a picture tells of the MoE layers of a model, by their paths."""
    names = ("d_model", "num_experts", "width", "top_k", "shared", "router")
    found = {}
    for layer in moe_layers(model):
        facts = {name: getattr(layer, name) for name in names if getattr(layer, name) is not None}
        found[layer.path] = {"kind": "moe", **facts}
    return found


def operations_with_layers(
    program: Program, located: Located, moe: Mapping[str, Facts]
) -> list[Operation]:
    """The operations of a program, with the layers and the misses that they are a part of.

    Args:
        program: what was recorded.
        located: what was found in it.
        moe: the MoE layers by path.
    """
    inserted = _inserted(program.graph, moe)
    operations = operations_of(program, _regions(program.graph, located.ffns) | inserted)
    modules = {ffn.path for ffn in located.ffns if ffn.placement == "module"}
    modules |= set(moe) - set(inserted.values())
    operations = [
        replace(one, layer=_outermost(one.path, modules)) if one.layer is None else one
        for one in operations
    ]
    for path in moe:
        operations = _with_all_between(operations, path)
    operations = _with_misses(operations, located.misses, moe)
    return _gathered(_beside_readers(operations), modules)


def _regions(graph: fx.Graph, ffns: Iterable[FFN]) -> dict[fx.Node, str]:
    """The nodes of each FFN: from its expansions to its contraction, bias included.

    Of linear maps that also compute something else, only the contraction is the FFN's here.
    """
    of_weight: dict[str, list[FFN]] = {}
    for ffn in ffns:
        of_weight.setdefault(ffn.contraction.weight, []).append(ffn)
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        end = linear_map(node) or computed_linear(node) or grouped_linear(node)
        for ffn in of_weight.get(end.weight, ()) if end is not None else ():
            assert end is not None
            try:
                hidden = trace(end.x, end.axis, ffn.contraction.columns)
            except NotAnFFNError:  # the same weight elsewhere
                continue
            nodes = {*hidden.visited, end.node, output_of(end)[0]}
            if ffn.shared:
                nodes -= {expansion.linear.node for expansion in hidden.expansions}
            found |= dict.fromkeys(nodes, ffn.path)
    return found


def _inserted(graph: fx.Graph, moe: Mapping[str, Facts]) -> dict[fx.Node, str]:
    """The nodes of the layers that upcycle put into an ONNX file, by their names there."""
    found = {}
    for node in graph.nodes:
        made_by = node.meta["value"].producer() if "value" in node.meta else None
        key = "" if made_by is None else str(made_by.name).partition("/")[0]
        for path in (key, key.rpartition(".")[0]):  # one that is applied several times has numbers
            if path in moe:
                found[node] = path
    return found


def _outermost(path: str, layers: set[str]) -> str | None:
    """The layer that a module is in."""
    parts = path.split(".")
    prefixes = ("", *(".".join(parts[: i + 1]) for i in range(len(parts))))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _with_all_between(operations: list[Operation], layer: str) -> list[Operation]:
    """In an ONNX file, what a layer does has not everywhere the name of the layer."""
    places = [i for i, operation in enumerate(operations) if operation.layer == layer]
    if not places:
        return operations
    after, before = set[str](), set[str]()
    window = range(places[0], places[-1] + 1)
    for operation in (operations[i] for i in window):
        if operation.layer == layer or not after.isdisjoint(operation.inputs):
            after.add(operation.name)
    for operation in (operations[i] for i in reversed(window)):
        if operation.layer == layer or operation.name in before:
            before.add(operation.name)
            before.update(operation.inputs)
    between = after & before
    read = {name for operation in operations for name in operation.inputs}
    for operation in (operations[i] for i in window):  # what nobody reads is of what it reads
        if operation.name not in read and operation.inputs and between.issuperset(operation.inputs):
            between.add(operation.name)
    return [replace(o, layer=layer) if o.name in between else o for o in operations]


def _with_misses(
    operations: list[Operation], misses: Iterable[Miss], moe: Mapping[str, Facts]
) -> list[Operation]:
    """Put the reason of each miss at its node; of a block that repeats another, in that block."""
    at_node: dict[str, list[int]] = {}
    for i, operation in enumerate(operations):
        at_node.setdefault(operation.node, []).append(i)
    reasons: dict[int, list[tuple[str, str]]] = {}
    for miss in misses:
        places = at_node.get(miss.node, [])
        if places and _outermost(miss.path, set(moe)) is None:
            place = max(places, key=lambda i: _common(operations[i].path, miss.path))
            reasons.setdefault(place, []).append((miss.path, miss.reason))
    return [
        replace(operation, misses=tuple(dict.fromkeys(reasons.get(i, ()))))
        for i, operation in enumerate(operations)
    ]


def _common(a: str, b: str) -> int:
    """How many parts two paths have in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    count = 0
    for x, y in pairs:
        if x != y:
            break
        count += 1
    return count


def _beside_readers(operations: list[Operation]) -> list[Operation]:
    """Put what is computed of weights alone before the one operation that reads it.

    An ONNX file has such operations at its beginning, and without the name of a module.
    """
    readers: dict[str, list[int]] = {}
    for i, operation in enumerate(operations):
        for name in operation.inputs:
            readers.setdefault(name, []).append(i)
    of_weights = set[str]()
    for one in operations:
        reads = one.weights or one.inputs
        if one.kind == "operation" and reads and of_weights.issuperset(one.inputs):
            of_weights.add(one.name)
    kept, place = list(operations), list(range(len(operations)))
    for i in reversed(range(len(kept))):
        by = readers.get(kept[i].name, [])
        if kept[i].name in of_weights and len(by) == 1 and kept[by[0]].kind == "operation":
            kept[i] = replace(kept[i], steps=kept[by[0]].steps, layer=kept[by[0]].layer)
            place[i] = place[by[0]]
    return [kept[i] for i in sorted(range(len(kept)), key=place.__getitem__)]


def _gathered(operations: list[Operation], modules: set[str]) -> list[Operation]:
    """Make each layer the last step of its operations, and put these where the last of them is.

    In an ONNX file some of them are in no module; then all are outside of it.
    """
    around = [_around(one, modules) for one in operations]
    least: dict[str | None, tuple[Step, ...]] = {}
    for one, steps in zip(operations, around, strict=True):
        least[one.layer] = min(least.get(one.layer, steps), steps, key=len)
    stepped = []
    for one, steps in zip(operations, around, strict=True):
        if one.layer is not None:
            outer = least[one.layer]
            kept = outer if steps[: len(outer)] == outer else steps
            one = replace(one, steps=(*kept, _own_step(one, one.layer, modules)))
        stepped.append(one)
    last = {one.steps: i for i, one in enumerate(stepped) if one.layer is not None}
    place = [i if one.layer is None else last[one.steps] for i, one in enumerate(stepped)]
    return [stepped[i] for i in sorted(range(len(stepped)), key=place.__getitem__)]


def _around(one: Operation, modules: set[str]) -> tuple[Step, ...]:
    """The calls around the layer of an operation: without its own, if it is a module."""
    if one.layer is None:
        return one.steps
    own = None if one.layer in modules else one.layer
    return tuple(s for s in one.steps if one.layer.startswith(f"{s[0]}.") or s[0] == own)


def _own_step(one: Operation, layer: str, modules: set[str]) -> Step:
    """The step into the layer of an operation: one for each call of its module."""
    calls = [call for path, call in one.steps if path == layer and layer in modules]
    return layer, LAYER - (calls[-1] if calls else 0)
