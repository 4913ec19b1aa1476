"""Run a layout operation of a captured graph on numbers of our own, to see what it moves where."""

import math
from typing import Any

import torch
from torch import fx

from upcycle.capture.recorder import op_name
from upcycle.passes.locate.hidden_tensor import NotAnFFNError, data_of
from upcycle.passes.locate.operations import LAYOUT, SHAPED_LIKE


def is_layout(node: fx.Node) -> bool:
    """Whether `node` moves the elements of one tensor; ``view(dtype)`` makes others of them."""
    retyped = any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))
    name = op_name(node.target)
    one = len(node.all_input_nodes) == 1 or name in SHAPED_LIKE
    return name in LAYOUT and one and not retyped


def is_stored(node: fx.Node) -> bool:
    """Whether `node` is a parameter or buffer, in whatever layout."""
    while node.op == "call_function" and op_name(node.target) in LAYOUT and is_layout(node):
        node = node.all_input_nodes[0]
    return node.op == "get_attr" and bool(node.meta["parameter"])


def run_layout(node: fx.Node, values: torch.Tensor) -> Any:
    """What the operation of `node` makes of `values`, which have the shape of its data input.

    Raises:
        NotAnFFNError: it is no layout operation, or depends on another tensor.
    """
    if not is_layout(node):
        raise NotAnFFNError(f"`{op_name(node.target)}` depends on another tensor", node)
    target: Any = node.target
    if getattr(target, "__name__", "") == "__get__":
        return target(values)
    if op_name(target) in SHAPED_LIKE:
        shape = node.meta["shape"]
        return values.expand(shape) if op_name(target) == "expand_as" else values.reshape(shape)
    return target(values, *node.args[1:], **node.kwargs)


def numbered(node: fx.Node) -> torch.Tensor:
    """The flat position of each element of what `node` makes, in its shape."""
    shape = node.meta["shape"]
    return torch.arange(math.prod(shape)).reshape(shape)


class Grid:
    """The flat positions of a tensor's elements, ``index_PC``: a position and a column of each.

    Most nodes of a walk are asked for the same grid, which is known by identity: large tensors
    would make it slow otherwise.
    """

    def __init__(self, node: fx.Node, axis: int, columns: tuple[int, int] | None) -> None:
        self._shape, self._axis = node.meta["shape"], axis
        index_PC = numbered(node).movedim(axis, -1).reshape(-1, self._shape[axis])
        self.index_PC = index_PC[:, slice(*columns or (None,))]

    def split(
        self, node: fx.Node, axis: int, index_PC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """For elements of `node`: the place along `axis` of each column, and each position.

        The last result is false where they are not the same for all positions and columns.
        """
        shape = node.meta["shape"]
        width = shape[axis]
        same = axis == self._axis and width == self._shape[axis] == index_PC.shape[1]
        if index_PC is self.index_PC and same and (axis == -1 or shape == self._shape):
            return torch.arange(width), torch.arange(len(index_PC)), True
        if axis != -1:  # count the elements with the axis last
            order = numbered(node).movedim(axis, -1).reshape(-1)
            where = torch.empty_like(order)
            where[order] = torch.arange(len(order))
            index_PC = where[index_PC]
        position_PC = index_PC // width
        row_PC = index_PC - position_PC * width
        regular = torch.equal(row_PC, row_PC[:1].expand_as(row_PC)) and torch.equal(
            position_PC, position_PC[:, :1].expand_as(position_PC)
        )
        return row_PC[0], position_PC[:, 0].clone(), regular


def source_of_join(node: fx.Node, index_PC: torch.Tensor) -> tuple[fx.Node, torch.Tensor]:
    """The one tensor of a concatenation that elements come from, and where in it they are.

    Raises:
        NotAnFFNError: they come from several tensors.
    """
    parts, *rest = node.args
    name = op_name(node.target)
    if not isinstance(parts, list | tuple):
        raise NotAnFFNError(f"`{name}` joins what is no list of tensors", node)
    sources = [part for part in parts if isinstance(part, fx.Node)]
    ends = torch.tensor([math.prod(source.meta["shape"]) for source in sources]).cumsum(0)
    starts = [0, *ends.tolist()]
    target: Any = node.target
    where = [numbered(source) + start for source, start in zip(sources, starts, strict=False)]
    moved_PC = target(where, *rest, **node.kwargs).reshape(-1)[index_PC]
    part_PC = torch.bucketize(moved_PC.contiguous(), ends, right=True)
    part = int(part_PC.reshape(-1)[0])
    if (part_PC != part).any():
        raise NotAnFFNError(f"`{name}` joins its hidden tensor with another", node)
    return sources[part], moved_PC - starts[part]


def joined_widths(node: fx.Node, axis: int) -> list[int]:
    """The widths along `axis` of the tensors that `node` concatenates along it, if it does that.

    Operations on the way that keep every element at its place are seen through.
    """
    rank = len(node.meta["shape"])
    while op_name(node.target) in {"dropout", "contiguous", "to", "clone"} and node.args:
        node = data_of(node)
    if op_name(node.target) not in {"cat", "concat", "concatenate"} or node.op != "call_function":
        return []
    dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if node.args[1:] else 0))
    parts = node.args[0]
    if not isinstance(dim, int) or dim % rank != axis % rank or not isinstance(parts, list | tuple):
        return []
    shapes = [part.meta["shape"] for part in parts if isinstance(part, fx.Node)]
    return [shape[axis] for shape in shapes if len(shape) == rank]  # a 1-D empty one adds nothing
