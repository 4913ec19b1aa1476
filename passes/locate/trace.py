"""Walk back from a hidden tensor: which neuron does each of its elements depend on?

Given the input of a candidate contraction as a grid (position p, column c), walk the graph
backwards and ask of every producer which of its elements each (p, c) needs:

- a pointwise operation needs the same element of each operand, through broadcasting;
- a layout operation (view, chunk, slice, transpose, ...) is run on ``arange(numel)``, so the
  result says where each element comes from and no layout operation needs a rule of its own;
- a linear map ends the walk: its output row is a neuron's expansion;
- a parameter ends it too: one number for each neuron, such as a bias;
- an operation of one tensor that is not pointwise is noted as the reason to refuse, and the walk
  goes on, to see whether the region would be an FFN without it;
- anything else ends the walk: the region is no FFN, and no near miss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from upcycle.capture.recorder import op_name, replayed_block
from upcycle.passes.locate import operations
from upcycle.passes.locate.hidden_tensor import (
    Expansion,
    HiddenTensor,
    NearMissError,
    NotAnFFNError,
    data_of,
)
from upcycle.passes.locate.layout import (
    Grid,
    is_layout,
    is_stored,
    numbered,
    run_layout,
    source_of_join,
)
from upcycle.passes.locate.linear import LinearMap, computed_linear, convolution_of, linear_map
from upcycle.passes.locate.refused_operations import elu_of_aten, why_not_linear, why_opaque
from upcycle.pointwise import OPS


@dataclass(frozen=True)
class _Stored:
    """Elements of a parameter or buffer: one for each column, the same at every position."""

    name: str
    index_C: torch.Tensor


# A walk through a norm may follow the residual stream, back to the first block of a deep model.
# It ends where it has met linear maps of more different inputs than an FFN's could be.
_INPUTS = 4

# What an element is: "z0", "b0" (z0 with the bias added), "t3", a stored tensor, or a number.
_Value = str | float | _Stored


def trace(hidden: fx.Node, axis: int, columns: tuple[int, int] | None = None) -> HiddenTensor:
    """Walk back from `hidden`, the data input of a contraction along `axis`, which is not empty.

    With `columns`, ``(start, stop)``, only those of its columns are the hidden tensor.

    Raises:
        NotAnFFNError: it is not the hidden tensor of an FFN.
    """
    grid = Grid(hidden, axis, columns)
    walk = _Walk(grid)
    try:
        value = walk.value(hidden, grid.index_PC)
    except RecursionError:
        reason = "the operations before it are too many in a row to follow"
        raise NearMissError(reason, hidden) from None
    if not walk.hidden.expansions:
        raise NotAnFFNError("no linear map feeds it", hidden)
    if not walk.hidden.steps or value != f"t{len(walk.hidden.steps) - 1}":
        raise NotAnFFNError("there is no nonlinearity between the linear maps", hidden)
    walk.hidden.name_biased()
    return walk.hidden


class _Walk:
    def __init__(self, grid: Grid) -> None:
        self.hidden = HiddenTensor()
        self._grid = grid
        self._memo: dict[fx.Node, list[tuple[torch.Tensor, _Value]]] = {}

    def value(self, node: fx.Node, index_PC: torch.Tensor) -> _Value:
        """What the elements `index_PC` of `node` are, in terms of the expansions."""
        for known_PC, value in self._memo.get(node, ()):
            if known_PC is index_PC or torch.equal(known_PC, index_PC):
                return value
        if node.op == "call_function":
            self.hidden.visited.add(node)
            self.hidden.taken.setdefault(node, []).append(index_PC)
        value = self._value(node, index_PC)
        self._memo.setdefault(node, []).append((index_PC, value))
        return value

    def _value(self, node: fx.Node, index_PC: torch.Tensor) -> _Value:
        linear = linear_map(node) or computed_linear(node)
        if linear is not None:
            return self._expansion(linear, index_PC)
        if node.op == "get_attr" and node.meta["parameter"]:
            if (index_PC != index_PC[:1]).any():
                self.hidden.note_mixing(
                    "its hidden tensor meets a parameter that depends on the position", node
                )
            return _Stored(node.meta["parameter"], index_PC[0])
        if node.op == "call_function" and (number := operations.filled_with(node)) is not None:
            return number
        if not node.all_input_nodes and node.op != "placeholder":
            self.hidden.note_parameter(
                "its nonlinearity reads a tensor that is no parameter of the model", node
            )
            return 1.0
        if node.op != "call_function":
            raise NotAnFFNError("it reads an input of the model", node)
        name = op_name(node.target)
        if name in operations.OF_TWO and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
            name = operations.OF_TWO[name]
        if name == "getitem_of":
            producer, item = node.args
            assert isinstance(producer, fx.Node)
            self.hidden.visited.add(producer)
            if op_name(producer.target) == "dropout" and item == 0:  # the other is the mask
                return self.value(self.hidden.through_dropout(producer), index_PC)
            if op_name(producer.target) in operations.LAYOUT:
                return self._layout(producer, index_PC, lambda out: out[item])
            return self._opaque(producer, node, index_PC)
        if name in operations.LAYOUT:
            return self._layout(node, index_PC, lambda out: out)
        if name in operations.JOINS:
            self.hidden.reshaped = True
            return self.value(*source_of_join(node, index_PC))
        if name == "dropout":
            return self.value(self.hidden.through_dropout(node), index_PC)
        if name in operations.CASTS:
            return self._cast(node, self.value(data_of(node), index_PC))
        if name == "glu":
            return self._glu(node, index_PC)
        if node.meta["dtype"] is torch.bool:  # arithmetic on truth values is something else
            name = operations.TRUTH.get(name, "bool " + name)
        if name == "prelu":
            return self._prelu(node, index_PC)
        if OPS.has(name) or name in {"addcmul", "rdiv", "rpow", "masked_fill"}:
            return self._pointwise(node, name, index_PC)
        if convolution_of(node) is not None:
            return self._convolution(node, index_PC)
        return self._opaque(node, node, index_PC)

    def _step(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> _Value:
        if not any(isinstance(arg, str) and arg[0] in "zbt" for arg in args):
            return operations.number_of(op, args)
        self.hidden.steps.append((op, args, kwargs or {}))
        return f"t{len(self.hidden.steps) - 1}"

    def _expansion(self, linear: LinearMap, index_PC: torch.Tensor) -> _Value:
        rows, positions, regular = self._grid.split(linear.node, linear.axis, index_PC)
        if not regular:
            self.hidden.note_mixing(
                "positions and neurons are mixed before the contraction", linear.node
            )
        for i, known in enumerate(self.hidden.expansions):
            if known.linear == linear and torch.equal(known.rows, rows):
                if not torch.equal(known.positions, positions):
                    self.hidden.note_mixing("its nonlinearity reads several positions", linear.node)
                return f"z{i}"
        self.hidden.expansions.append(Expansion(linear, rows, positions))
        inputs = {expansion.linear.x for expansion in self.hidden.expansions}
        if self.hidden.mixing and len(inputs) > _INPUTS:
            raise NotAnFFNError("it reads a residual stream", linear.node)
        return f"z{len(self.hidden.expansions) - 1}"

    def _layout(
        self, node: fx.Node, index_PC: torch.Tensor, pick: Callable[[Any], torch.Tensor]
    ) -> _Value:
        source = data_of(node)
        self.hidden.reshaped = True
        if op_name(node.target) in operations.KEEPS_ORDER and is_layout(node):
            return self.value(source, index_PC)
        moved = pick(run_layout(node, numbered(source)))
        return self.value(source, moved.reshape(-1)[index_PC])

    def _cast(self, node: fx.Node, ref: _Value) -> _Value:
        """A cast to the dtype of the linear maps stays one if the model's dtype is changed."""
        dtype = node.meta["dtype"]
        if not isinstance(ref, str) or data_of(node).meta["dtype"] == dtype:
            return ref
        if dtype == self.hidden.expansions[0].linear.node.meta["dtype"]:
            return self._step("cast_like", (ref, "z0"))
        return self._step("cast", (ref, str(dtype).removeprefix("torch.")))

    def _glu(self, node: fx.Node, index_PC: torch.Tensor) -> _Value:
        source = data_of(node)
        axis: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        self.hidden.reshaped = True
        halves = numbered(source).chunk(2, axis)
        up, gate = (self.value(source, half.reshape(-1)[index_PC]) for half in halves)
        return self._step("mul", (up, self._step("sigmoid", (gate,))))

    def _convolution(self, node: fx.Node, index_PC: torch.Tensor) -> _Value:
        """A convolution that reads several positions, as an expansion or within the hidden part."""
        linear = convolution_of(node)
        assert linear is not None
        self.hidden.note_mixing(why_not_linear(node), node)
        if linear.x.meta["shape"] == node.meta["shape"] and node.args[1:]:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.meta["shape"][1] == 1:  # depthwise
                return self.value(linear.x, index_PC)
        return self._expansion(linear, index_PC)

    def _prelu(self, node: fx.Node, index_PC: torch.Tensor) -> _Value:
        slope = node.args[1]
        assert isinstance(slope, fx.Node)
        self._note_parameter(str(slope.meta.get("parameter")), node)
        return self._step("leaky_relu", (self.value(data_of(node), index_PC),))

    def _opaque(self, node: fx.Node, out: fx.Node, index_PC: torch.Tensor) -> _Value:
        """An operation that is not pointwise; go on through it where it has one tensor to read."""
        name = op_name(node.target)
        data = [source for source in node.all_input_nodes if not is_stored(source)]
        mixes = name in operations.NONLINEAR_MIXERS | operations.SCALING_MIXERS
        reason = f"`{name}` mixes the hidden axis" if mixes else why_opaque(node)
        if len(data) != 1 or node.target is replayed_block:
            raise NotAnFFNError(reason, node)
        if data[0].meta.get("shape") != out.meta["shape"]:
            if name not in operations.SCALING_MIXERS:
                raise NotAnFFNError(reason, node)
            if (index_PC != index_PC[:, :1]).any():
                reason = f"`{name}` mixes positions"
            self.hidden.note_mixing(reason, node)
            return 1.0  # a factor that all columns share
        self.hidden.note_mixing(reason if mixes else why_opaque(node, data[0]), node)
        ref = self.value(data[0], index_PC)
        is_linear = name in operations.SCALING_MIXERS | operations.AFFINE
        return ref if is_linear else self._step(name, (ref,))

    def _pointwise(self, node: fx.Node, name: str, index_PC: torch.Tensor) -> _Value:
        shape = node.meta["shape"]
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            raise NotAnFFNError(f"`{name}` depends on another tensor", node)
        args: list[Any] = []
        given = list(node.args)
        if name == "masked_fill":
            name, given = "where", [given[1], given[2], given[0]]
        for arg in given:
            if not isinstance(arg, fx.Node):
                args.append(arg)
            elif arg.meta["shape"] == shape:
                args.append(self.value(arg, index_PC))
            else:
                where = numbered(arg).expand(shape).reshape(-1)
                args.append(self.value(arg, where[index_PC]))
        if name == "addcmul":
            base, *factors = args
            scale = node.kwargs.get("value", 1.0)
            product = self._step("mul", (self._combined("mul", node, factors), scale))
            return self._combined("add", node, [base, product])
        return self._combined(name, node, args)

    def _combined(self, name: str, node: fx.Node, args: list[Any]) -> _Value:
        """The step of a pointwise operation on `args`, which may be stored."""
        stored = [arg for arg in args if isinstance(arg, _Stored)]
        if stored:
            return self._with_stored(name, node, args, stored)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "value")}
        if name in operations.INPLACE:
            args = [a for a in args if not isinstance(a, bool)]  # a positional inplace flag
        if name == "elu" and args[2:]:
            name, args, scale = elu_of_aten(node, *args)
            return self._step("mul", (self._step(name, tuple(args)), scale))
        if name == "rdiv":  # torch computes ``other / x`` like this, too
            return self._step("mul", (self._step("reciprocal", (args[0],)), args[1]))
        if name == "rpow":
            return self._step("pow", (args[1], args[0]))
        return self._step(name, tuple(args), kwargs)

    def _with_stored(
        self, name: str, node: fx.Node, args: list[Any], stored: list[_Stored]
    ) -> _Value:
        """A parameter that is added to a linear map is its bias; any other use is refused."""
        rest = [arg for arg in args if isinstance(arg, str)]
        if name == "add" and len(args) == 2 and not node.kwargs and rest and rest[0][0] == "z":
            i = int(rest[0][1:])
            expansion = self.hidden.expansions[i]
            if (
                not expansion.linear.bias
                and self.hidden.biases.get(i, stored[0].name) == stored[0].name
                and torch.equal(stored[0].index_C, expansion.rows)
            ):
                self.hidden.biases[i] = stored[0].name
                return f"b{i}"
        self._note_parameter(stored[0].name, node)
        return rest[0] if rest else 1.0

    def _note_parameter(self, name: str, node: fx.Node) -> None:
        self.hidden.note_parameter(f"its nonlinearity has a parameter of its own (`{name}`)", node)
