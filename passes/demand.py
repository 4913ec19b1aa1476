"""Backward demand analysis: which neuron does each element of a hidden tensor depend on?

Given the input of a candidate contraction as a grid (position p, column c), walk the graph
backwards and ask of every producer which of its elements each (p, c) needs:

- a pointwise operation needs the same element of each operand, through broadcasting;
- a layout operation (view, chunk, slice, transpose, ...) is run on ``arange(numel)``, so the
  result says where each element comes from and no layout operation needs a rule of its own;
- a linear map ends the walk: its output row is a neuron's expansion;
- a parameter ends it too: one number for each neuron, such as a bias;
- anything else means that the region is no FFN, and the reason is kept.

What remains is one pointwise program that is the same for every column.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from upcycle.capture import op_name
from upcycle.passes.linear import LinearMap, linear_map
from upcycle.pointwise import OPS, Step

LAYOUT = {
    "chunk", "contiguous", "detach", "expand", "flatten", "flip", "getitem", "movedim", "narrow",
    "permute", "reshape", "roll", "select", "split", "split_with_sizes", "squeeze", "swapaxes",
    "swapdims", "t", "T", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "clone", "alias", "expand_as", "view_as", "reshape_as",
}  # fmt: skip
# Of these, the ones that leave every element at its place in the flat order.
_KEEPS_ORDER = {"alias", "clone", "contiguous", "detach", "flatten", "reshape", "squeeze",
                "unflatten", "unsqueeze", "view"}  # fmt: skip
CASTS = {
    "to": None,
    "float": "float32",
    "half": "float16",
    "bfloat16": "bfloat16",
    "double": "float64",
}
MIXERS = {"layer_norm", "rms_norm", "group_norm", "softmax", "cumsum", "normalize", "mean", "sum"}


class NotPointwise(Exception):
    """The walk met something that is not pointwise along the hidden axis."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


@dataclass
class Expansion:
    """A linear map that feeds the hidden tensor: row ``rows[c]`` of it belongs to column c."""

    linear: LinearMap
    rows: torch.Tensor
    positions: torch.Tensor


@dataclass
class Demand:
    """The result of a walk.

    Attributes:
        expansions: in the order of first use.
        steps: the pointwise program on them.
        visited: every node between the expansions and the contraction, expansions included.
        biases: index of an expansion -> name of a per-neuron parameter added to it.
        dropout: probability of the dropout met on the way.
        refusal: why the region is no FFN although the walk reached its end.
    """

    expansions: list[Expansion] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    visited: set[fx.Node] = field(default_factory=set)
    biases: dict[int, str] = field(default_factory=dict)
    dropout: float = 0.0
    refusal: NotPointwise | None = None


def trace(hidden: fx.Node, axis: int) -> Demand:
    """Walk back from `hidden`, the data input of a contraction along `axis`.

    Raises:
        NotPointwise: with the reason and the node.
    """
    walk = _Walk(Demand())
    shape = hidden.meta["shape"]
    grid = torch.arange(_numel(shape)).reshape(shape).movedim(axis, -1)
    ref = walk.value(hidden, grid.reshape(-1, shape[axis]))
    if not walk.demand.expansions:
        raise NotPointwise("no linear map feeds it", hidden)
    if not walk.demand.steps or ref != f"t{len(walk.demand.steps) - 1}":
        raise NotPointwise("there is no nonlinearity between the linear maps", hidden)
    if walk.demand.refusal is not None:
        raise walk.demand.refusal
    return walk.demand


class _Walk:
    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self._memo: dict[tuple[fx.Node, int], str] = {}

    def value(self, node: fx.Node, index_PC: torch.Tensor) -> str:
        """The reference ("z0", "t3") of the elements `index_PC` of `node`."""
        key = (node, hash(index_PC.contiguous().numpy().tobytes()))
        if key not in self._memo:
            self.demand.visited.add(node)
            self._memo[key] = self._value(node, index_PC)
        return self._memo[key]

    def _value(self, node: fx.Node, index_PC: torch.Tensor) -> str:
        linear = linear_map(node)
        if linear is not None:
            return self._expansion(linear, index_PC)
        if node.op != "call_function":
            raise NotPointwise(f"it reads {node.name}, which no linear map made", node)
        name = op_name(node.target)
        if name == "getitem_of":
            producer, item = node.args
            assert isinstance(producer, fx.Node)
            self.demand.visited.add(producer)
            return self._layout(producer, index_PC, lambda out: out[item])
        if name in LAYOUT:
            return self._layout(node, index_PC, lambda out: out)
        if name == "dropout":
            probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            self.demand.dropout = max(self.demand.dropout, float(probability))  # type: ignore[arg-type]
            return self.value(_first(node), index_PC)
        if name in CASTS or name == "type_as":
            ref = self.value(_first(node), index_PC)
            if _first(node).meta["dtype"] == node.meta["dtype"]:
                return ref
            return self._step("cast", (ref, str(node.meta["dtype"]).removeprefix("torch.")), {})
        if name in OPS:
            return self._pointwise(node, name, index_PC)
        if name in MIXERS:
            raise NotPointwise(f"`{name}` mixes the hidden axis", node)
        raise NotPointwise(f"`{name}` is not known to be pointwise", node)

    def _step(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        self.demand.steps.append((op, args, kwargs))
        return f"t{len(self.demand.steps) - 1}"

    def _expansion(self, linear: LinearMap, index_PC: torch.Tensor) -> str:
        shape = linear.node.meta["shape"]
        if linear.axis != -1:  # count the elements with the axis of the map last
            order = torch.arange(_numel(shape)).reshape(shape).movedim(linear.axis, -1).reshape(-1)
            where = torch.empty_like(order)
            where[order] = torch.arange(len(order))
            index_PC = where[index_PC]
        position_PC = index_PC // shape[linear.axis]
        row_PC = index_PC % shape[linear.axis]
        if (row_PC != row_PC[:1]).any() or (position_PC != position_PC[:, :1]).any():
            raise NotPointwise(
                "positions and neurons are mixed before the contraction", linear.node
            )
        for i, known in enumerate(self.demand.expansions):
            if known.linear == linear and torch.equal(known.rows, row_PC[0]):
                return f"z{i}"
        self.demand.expansions.append(Expansion(linear, row_PC[0], position_PC[:, 0]))
        return f"z{len(self.demand.expansions) - 1}"

    def _layout(
        self, node: fx.Node, index_PC: torch.Tensor, pick: Callable[[Any], torch.Tensor]
    ) -> str:
        source = _first(node)
        if any(isinstance(arg, fx.Node) for arg in (*node.args[1:], *node.kwargs.values())):
            raise NotPointwise(f"`{op_name(node.target)}` depends on another tensor", node)
        if op_name(node.target) in _KEEPS_ORDER:
            return self.value(source, index_PC)
        shape = source.meta["shape"]
        where = torch.arange(_numel(shape)).reshape(shape)
        target: Any = node.target
        if getattr(target, "__name__", "") == "__get__":
            moved = pick(target(where))
        else:
            moved = pick(target(where, *node.args[1:], **node.kwargs))
        return self.value(source, moved.reshape(-1)[index_PC])

    def _pointwise(self, node: fx.Node, name: str, index_PC: torch.Tensor) -> str:
        shape = node.meta["shape"]
        bias: str | None = None
        args: list[Any] = []
        for arg in node.args:
            if not isinstance(arg, fx.Node):
                args.append(arg)
                continue
            size = _numel(arg.meta["shape"])
            operand_PC = index_PC
            if arg.meta["shape"] != shape:
                where = torch.arange(size).reshape(arg.meta["shape"]).expand(shape).reshape(-1)
                operand_PC = where[index_PC]
            if arg.op == "get_attr" and arg.meta["parameter"]:
                bias = arg.meta["parameter"]
                if name != "add" or not torch.equal(operand_PC[0], torch.arange(size)):
                    # Go on: only if all else is pointwise is this worth telling.
                    self.demand.refusal = NotPointwise(
                        "a learned parameter is in its nonlinearity", arg
                    )
                continue
            args.append(self.value(arg, operand_PC))
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            raise NotPointwise(f"`{name}` depends on another tensor", node)
        if bias is not None:
            return self._add_bias(args[0], bias, node) if args else "z0"
        if op_is_reversed(node):
            args.reverse()
        kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        if name in {"relu", "silu", "elu", "leaky_relu", "hardswish", "mish", "selu", "celu"}:
            args = [a for a in args if not isinstance(a, bool)]  # a positional inplace flag
        return self._step(name, tuple(args), kwargs)

    def _add_bias(self, ref: str, parameter: str, node: fx.Node) -> str:
        """A per-neuron parameter that is added right after a linear map is that map's bias."""
        i = int(ref[1:])
        if ref[0] != "z" or self.demand.expansions[i].linear.bias or i in self.demand.biases:
            refusal = NotPointwise("a learned parameter is in its nonlinearity", node)
            self.demand.refusal = self.demand.refusal or refusal
            return ref
        self.demand.biases[i] = parameter
        return ref


def op_is_reversed(node: fx.Node) -> bool:
    """``__rsub__`` and its like take their operands the other way round."""
    return getattr(node.target, "__name__", "") in {
        "__rsub__",
        "__rtruediv__",
        "__rdiv__",
        "__rpow__",
    }


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise NotPointwise(f"`{op_name(node.target)}` makes a tensor of its own", node)
    return source


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
