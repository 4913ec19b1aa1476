"""The folded picture: one box for each module that has no layer in it, repeats only once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from upcycle.drawing.digraph import DiGraph
from upcycle.drawing.items import Item, items_of, signature
from upcycle.drawing.layers import Facts
from upcycle.drawing.operations import Operation, shape_facts
from upcycle.drawing.repeats import pattern_of, repeats


@dataclass
class _Folding:
    """What is made on the way.

    Attributes:
        graph: has the boxes.
        box_of: name of an operation -> its box; only of the first of each group of repeats.
        first: name of an operation in a repeat -> that of the same one in the first repeat.
        turns: name of an operation -> the groups that it is in, and in which repeat of each.
        patterns: path of a first repeat -> the paths of all.
        groups: how many there are.
    """

    graph: DiGraph
    layers: Mapping[str, Facts]
    box_of: dict[str, str] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    turns: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    groups: int = 0


def folded(operations: Sequence[Operation], layers: Mapping[str, Facts]) -> DiGraph:
    """The graph of boxes, in the order in which they run; see `upcycle.drawing.graph.graph_of`.

    Args:
        operations: of the whole model.
        layers: what is told of each FFN and MoE layer, by path.
    """
    made = _Folding(DiGraph(frames={}), layers)
    items = items_of(operations)
    while len(inner := [item for item in items if item.kind not in ("input", "output")]) == 1:
        if inner[0].kind != "module":
            break
        at = items.index(inner[0])
        items[at : at + 1] = inner[0].items
    _fold(made, items, frame="", count=1)
    _join(made, operations)
    return made.graph


def _fold(made: _Folding, items: Sequence[Item], frame: str, count: int) -> None:
    for start, period, times in repeats([signature(item) for item in items]):
        group = items[start : start + period]
        if times == 1:
            _add(made, group[0], frame, count)
            continue
        runs = [items[start + k * period : start + (k + 1) * period] for k in range(times)]
        made.groups += 1
        number = made.groups
        for k, run in enumerate(runs):
            for item, original in zip(run, group, strict=True):
                for one, same in zip(item.operations, original.operations, strict=True):
                    made.turns.setdefault(one.name, []).append((number, k))
                    if k:
                        made.first[one.name] = same.name
        for j, item in enumerate(group):
            if item.kind != "operations":
                made.patterns[item.path] = pattern_of([run[j].path for run in runs])
        if period == 1 and not group[0].is_open:
            _add(made, group[0], frame, count * times)
            continue
        paths = list(dict.fromkeys(item.path for item in group if item.kind != "operations"))
        inner = _new_frame(made, paths, frame, count, times)
        for item in group:
            _add(made, item, inner, count * times)


def _new_frame(made: _Folding, paths: Sequence[str], inside: str, count: int, times: int) -> str:
    """The key of a frame around the first of `times` repeats of modules at `paths`."""
    frames = made.graph.graph["frames"]
    name = f"frame {len(frames)}"
    frames[name] = {
        "title": " and ".join(_pattern(made, path) for path in paths),
        "path": paths[0] if len(paths) == 1 else "",
        "times": times,
        "count": count * times,
        "inside": inside,
    }
    return name


def _add(made: _Folding, item: Item, frame: str, count: int) -> None:
    """Add the box of an item, or those in it."""
    if item.is_open:
        if not frame and item.path.rpartition(".")[2].isdigit():  # one of a list, unlike the others
            frame = _new_frame(made, [item.path], frame, count, 1)
        _fold(made, item.items, frame, count)
        return
    first, last = item.operations[0], item.operations[-1]
    name = _unique(made, item.path if item.kind in ("module", "layer") else first.name)
    facts = made.layers[item.path] if item.kind == "layer" else {"kind": item.kind}
    misses = dict.fromkeys(miss for one in item.operations for miss in one.misses)
    reasons = [f"{_pattern(made, path) or 'the model'}: {why}" for path, why in misses]
    made.graph.add_node(
        name,
        **facts,
        path=item.path,
        pattern=_pattern(made, item.path),
        frame=frame,
        count=count,
        operations=len(item.operations),
        **_weights(item.operations),
        **_what(item),
        **({"miss": "\n".join(reasons)} if reasons else {}),
        **shape_facts(last),
        **({"source": first.source} if len(item.operations) == 1 and first.source else {}),
    )
    made.box_of.update((one.name, name) for one in item.operations)


def _what(item: Item) -> Facts:
    """What runs in a box that is no module: each operation once, in their order."""
    if item.kind in ("module", "layer"):
        return {}
    return {"ops": ", ".join(dict.fromkeys(one.op for one in item.operations))}


def _weights(operations: Iterable[Operation]) -> Facts:
    sizes = {name: size for one in operations for name, size in one.weights}
    return {"weights": sum(sizes.values())} if sizes else {}


def _join(made: _Folding, operations: Sequence[Operation]) -> None:
    """Add the edges: within the first repeat of each group, and as `next` to the one after it."""
    by_name = {one.name: one for one in operations}
    for one in operations:
        target, turns = _resolved(made, one.name)
        for name in one.inputs:
            source, others = _resolved(made, name)
            is_next = any(others.get(group, k) != k for group, k in turns.items())
            if source == target and not is_next:
                continue
            known = made.graph.get_edge_data(source, target)
            if known is None or (known.get("next") and not is_next):
                made.graph.add_edge(source, target, next=is_next, **shape_facts(by_name[name]))


def _resolved(made: _Folding, name: str) -> tuple[str, dict[int, int]]:
    """The box of an operation, and which repeats of which groups it is in."""
    turns: dict[int, int] = {}
    while True:
        for group, k in made.turns.get(name, ()):
            turns.setdefault(group, k)
        if name not in made.first:
            return made.box_of[name], turns
        name = made.first[name]


def _pattern(made: _Folding, path: str) -> str:
    """The paths of all repeats of what is at `path`."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        prefix = ".".join(parts[:i])
        if prefix in made.patterns:
            rest = path[len(prefix) :]
            whole = made.patterns[prefix]
            outer = _pattern(made, ".".join(parts[: i - 1]))
            return outer + whole[len(".".join(parts[: i - 1])) :] + rest
    return path


def _unique(made: _Folding, name: str) -> str:
    """A name for a box: that of its module, with a number where there are several."""
    found, number = name or "model", 2
    while found in made.graph:
        found, number = f"{name or 'model'}#{number}", number + 1
    return found
