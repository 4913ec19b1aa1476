"""The operations of a model as boxes within boxes: calls of modules, layers, what lies between."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from upcycle.drawing.layers import LAYER
from upcycle.drawing.operations import Operation

Kind = Literal["input", "output", "module", "layer", "operations"]


@dataclass(frozen=True)
class Item:
    """Some operations in a row that are one box, or that are boxes themselves.

    Attributes:
        kind: a call of a module, a layer, or operations that a module runs between others.
        path: of the module or layer; of operations, that of the module around them.
        depth: how many steps lead to it.
        operations: all that it does.
    """

    kind: Kind
    path: str
    depth: int
    operations: tuple[Operation, ...]

    @property
    def is_open(self) -> bool:
        """Whether it is to be seen from inside: there is a layer in it, or a miss in a module."""
        return self.kind == "module" and any(
            any(number <= LAYER for _, number in one.steps[self.depth :])
            or (one.misses and len(one.steps) > self.depth)
            for one in self.operations
        )

    @property
    def items(self) -> list["Item"]:
        """What it consists of."""
        return items_of(self.operations, self.depth, self.path)


def items_of(operations: Sequence[Operation], depth: int = 0, path: str = "") -> list[Item]:
    """Group neighbours by the step that comes after `depth` others.

    Args:
        operations: they have the first `depth` steps in common.
        depth: of the item that they are.
        path: of that item.
    """

    def key(one: Operation) -> Hashable:
        if one.kind != "operation":
            return one.name
        return one.steps[depth] if len(one.steps) > depth else None

    found = []
    for step, group in groupby(operations, key):
        members = tuple(group)
        first = members[0]
        if first.kind != "operation":
            kind: Kind = "input" if first.kind == "input" else "output"
            found.append(Item(kind, "", depth, members))
        elif step is None:
            found.append(Item("operations", path, depth, members))
        else:
            inner, number = first.steps[depth]
            kind = "layer" if number <= LAYER else "module"
            found.append(Item(kind, inner, depth + 1, members))
    return found


def signature(item: Item) -> Hashable:
    """Equal for items that do the same with tensors of the same shapes, but for their numbers.

    What comes from outside is not compared: one block reads what the block before it makes.
    Of the modules inside it has the names only: several blocks may share one, such as an
    activation, whose path is in the first of them.
    """
    place = {one.name: i for i, one in enumerate(item.operations)}
    return (
        item.kind,
        re.sub(r"\d+", "#", item.path),
        item.operations[0].name if item.kind in ("input", "output") else None,
        tuple(
            (
                one.op,
                one.shape,
                one.dtype,
                one.layer.removeprefix(item.path) if one.layer else one.layer,
                bool(one.misses),
                tuple(_name(path) for path, _ in one.steps[item.depth :]),
                tuple(place.get(name) for name in one.inputs),
                tuple(size for _, size in one.weights),
            )
            for one in item.operations
        ),
    )


def _name(path: str) -> str:
    return re.sub(r"\d+", "#", path.rpartition(".")[2])
