"""Run a layout operation of a captured graph on numbers of our own, to see what it moves where."""

import math
from typing import Any

import torch
from torch import fx

from upcycle.passes.hidden import NotPointwiseError
from upcycle.passes.operations import LAYOUT
from upcycle.recorder import op_name


def is_layout(node: fx.Node) -> bool:
    """Whether `node` moves the elements of one tensor; ``view(dtype)`` makes others of them."""
    retyped = any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))
    return op_name(node.target) in LAYOUT and len(node.all_input_nodes) == 1 and not retyped


def run_layout(node: fx.Node, values: torch.Tensor) -> Any:
    """What the operation of `node` makes of `values`, which have the shape of its data input.

    Raises:
        NotPointwiseError: it is no layout operation, or depends on another tensor.
    """
    if not is_layout(node):
        raise NotPointwiseError(f"`{op_name(node.target)}` depends on another tensor", node)
    target: Any = node.target
    if getattr(target, "__name__", "") == "__get__":
        return target(values)
    return target(values, *node.args[1:], **node.kwargs)


def numbered(node: fx.Node) -> torch.Tensor:
    """The flat position of each element of what `node` makes, in its shape."""
    shape = node.meta["shape"]
    return torch.arange(math.prod(shape)).reshape(shape)


def source_of_join(node: fx.Node, index_PC: torch.Tensor) -> tuple[fx.Node, torch.Tensor]:
    """The one tensor of a concatenation that elements come from, and where in it they are.

    Raises:
        NotPointwiseError: they come from several tensors.
    """
    parts, *rest = node.args
    name = op_name(node.target)
    if not isinstance(parts, list | tuple):
        raise NotPointwiseError(f"`{name}` joins what is no list of tensors", node)
    sources = [part for part in parts if isinstance(part, fx.Node)]
    ends = torch.tensor([math.prod(source.meta["shape"]) for source in sources]).cumsum(0)
    starts = [0, *ends.tolist()]
    target: Any = node.target
    where = [numbered(source) + start for source, start in zip(sources, starts, strict=False)]
    moved_PC = target(where, *rest, **node.kwargs).reshape(-1)[index_PC]
    part_PC = torch.bucketize(moved_PC.contiguous(), ends, right=True)
    part = int(part_PC.reshape(-1)[0])
    if (part_PC != part).any():
        raise NotPointwiseError(f"`{name}` joins its hidden tensor with another", node)
    return sources[part], moved_PC - starts[part]


def joined_widths(node: fx.Node, axis: int) -> list[int]:
    """The widths along `axis` of the tensors that `node` concatenates along it, if it does that.

    Operations on the way that keep every element at its place are seen through.
    """
    rank = len(node.meta["shape"])
    while op_name(node.target) in {"dropout", "contiguous", "to", "clone"} and node.args:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if op_name(node.target) not in {"cat", "concat", "concatenate"} or node.op != "call_function":
        return []
    dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if node.args[1:] else 0))
    parts = node.args[0]
    if not isinstance(dim, int) or dim % rank != axis % rank or not isinstance(parts, list | tuple):
        return []
    shapes = [part.meta["shape"] for part in parts if isinstance(part, fx.Node)]
    return [shape[axis] for shape in shapes if len(shape) == rank]  # a 1-D empty one adds nothing
