"""ONNX operations as torch calls of the same meaning: the ones that an FFN may consist of.

A translation returns the node for the first output, or one for each output. What it cannot express
it refuses, and the node becomes opaque.
"""

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.nn import functional as F

from upcycle.onnx.tensors import TORCH_TYPES
from upcycle.passes.locate.linear import linear_map
from upcycle.passes.locate_onnx.linear import LINEAR, MS
from upcycle.passes.locate_onnx.program import NoTorchCallError, Reader, Translation

_SINGLE = {"Cast", "Identity", "Reshape", "Sqrt", "Squeeze", "Unsqueeze"}  # of one number
_FAR = 16  # operations between a number and where it is used, at most


def number(value: ir.Value | None) -> float | None:
    """The number that a tensor of one element holds, if it is a constant."""
    roots = 0
    for _ in range(_FAR):
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is not None:
            single = float(tensor.numpy().reshape(-1)[0]) if tensor.size == 1 else None
            if single is None or not roots:
                return single
            return float(single**0.5**roots) if single >= 0 else None
        producer = None if value is None else value.producer()
        if producer is None or not producer.inputs or producer.op_type not in _SINGLE:
            return None
        roots += producer.op_type == "Sqrt"
        value = producer.inputs[0]
    return None


def integers(node: ir.Node, name: str, index: int) -> list[int] | None:
    """A list that is an attribute in old opsets and a constant input in new ones."""
    if name in node.attributes:
        return [int(i) for i in node.attributes[name].as_ints()]
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(i) for i in tensor.numpy().reshape(-1)]


def _operands(g: Reader, node: ir.Node) -> list[fx.Node | float]:
    """Tensors as nodes, constants of one element as numbers."""
    values = [value for value in node.inputs if value is not None]
    data = [g.node_of(v) for v in values if not g.origins.is_constant(v)]
    maps = [linear_map(n) for n in data]
    owner = next((m.weight for m in maps if m is not None), str(node.outputs[0].name))
    found: list[fx.Node | float] = []
    for value in values:
        single = number(value) if data else None
        found.append(g.per_neuron(value, owner) if single is None else single)
    return found


def _binary(target: Callable[..., Any], reflected: Callable[..., Any]) -> Translation:
    def translate(g: Reader, node: ir.Node) -> fx.Node:
        a, b = _operands(g, node)
        return g.emit(target, a, b) if isinstance(a, fx.Node) else g.emit(reflected, b, a)

    return translate


def _extreme(target: Callable[..., Any], bound: str) -> Translation:
    def translate(g: Reader, node: ir.Node) -> fx.Node:
        operands = _operands(g, node)
        out, *rest = sorted(operands, key=lambda arg: not isinstance(arg, fx.Node))
        for other in rest:
            if isinstance(other, fx.Node):
                out = g.emit(target, out, other)
            else:
                out = g.emit(torch.clamp, out, **{bound: other})
        assert isinstance(out, fx.Node)
        return out

    return translate


def _unary(target: Callable[..., Any]) -> Translation:
    return lambda g, node: g.emit(target, g.first_input(node))


def _slope(target: Callable[..., Any], default: float) -> Translation:
    """Operations with the attribute `alpha`, which torch takes as second argument."""
    return lambda g, node: g.emit(
        target, g.first_input(node), node.attributes.get_float("alpha", default)
    )


def _selu(g: Reader, node: ir.Node) -> fx.Node:
    if node.attributes.get_float("alpha", 1.67326) < 1.6 or "gamma" in node.attributes:
        raise NoTorchCallError("Selu with options")
    return g.emit(F.selu, g.first_input(node))


def _hard_sigmoid(g: Reader, node: ir.Node) -> fx.Node:
    alpha = node.attributes.get_float("alpha", 0.2)
    scaled = g.emit(torch.mul, g.first_input(node), alpha)
    shifted = g.emit(torch.add, scaled, node.attributes.get_float("beta", 0.5))
    return g.emit(torch.clamp, shifted, min=0.0, max=1.0)


def _clip(g: Reader, node: ir.Node) -> fx.Node:
    limits: dict[str, float] = {}
    for key, value in zip(("min", "max"), node.inputs[1:], strict=False):
        if value is not None:
            limit = number(value)
            if limit is None:
                raise NoTorchCallError("Clip to computed limits")
            limits[key] = limit
    x = g.first_input(node)
    return g.emit(torch.clamp, x, **limits) if limits else g.emit(torch.clone, x)


def _cast(g: Reader, node: ir.Node) -> fx.Node:
    dtype = TORCH_TYPES.get(ir.DataType(node.attributes.get_int("to", 0)))
    if dtype is None:
        raise NoTorchCallError("Cast to a type that torch lacks")
    return g.emit(torch.Tensor.to, g.first_input(node), dtype)


def _gelu(approximate: str | None = None) -> Translation:
    """Gelu, after a bias where the operation has one."""

    def translate(g: Reader, node: ir.Node) -> fx.Node:
        operands = _operands(g, node)
        x = operands[0] if len(operands) == 1 else g.emit(torch.add, *operands)
        form = approximate or node.attributes.get_string("approximate", "none")
        return g.emit(F.gelu, x, approximate=form)

    return translate


def _swish(default: float) -> Translation:
    def translate(g: Reader, node: ir.Node) -> fx.Node:
        x, alpha = g.first_input(node), node.attributes.get_float("alpha", default)
        if alpha == 1:
            return g.emit(F.silu, x)
        return g.emit(torch.mul, x, g.emit(torch.sigmoid, g.emit(torch.mul, x, alpha)))

    return translate


def _reshape(g: Reader, node: ir.Node) -> fx.Node:
    """Whatever keeps the order of the elements."""
    return g.emit(torch.reshape, g.first_input(node), g.shape_of(node.outputs[0]))


def _expand(g: Reader, node: ir.Node) -> fx.Node:
    return g.emit(torch.Tensor.expand, g.first_input(node), g.shape_of(node.outputs[0]))


def _transpose(g: Reader, node: ir.Node) -> fx.Node:
    x = g.first_input(node)
    rank = len(x.meta["shape"])
    perm = integers(node, "perm", 9) or list(range(rank))[::-1]
    return g.emit(torch.t, x) if perm == [1, 0] else g.emit(torch.permute, x, perm)


def _split(g: Reader, node: ir.Node) -> dict[ir.Value, fx.Node]:
    x, axis = g.first_input(node), node.attributes.get_int("axis", 0)
    parts = len(node.outputs)
    whole = x.meta["shape"][axis]
    sizes = integers(node, "split", 1)
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            raise NoTorchCallError("Split into computed sizes")
        each = -(-whole // parts)
        sizes = [min(each, whole - i * each) for i in range(parts)]
    starts = [sum(sizes[:i]) for i in range(parts)]
    return {
        value: g.emit(torch.narrow, x, axis, start, size)
        for value, start, size in zip(node.outputs, starts, sizes, strict=True)
    }


def _slice(g: Reader, node: ir.Node) -> fx.Node:
    x = g.first_input(node)
    starts, ends = integers(node, "starts", 1), integers(node, "ends", 2)
    if starts is None or ends is None:
        raise NoTorchCallError("Slice with computed limits")
    axes = integers(node, "axes", 3) or list(range(len(starts)))
    steps = integers(node, "steps", 4) or [1] * len(starts)
    index = [slice(None)] * len(x.meta["shape"])
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise NoTorchCallError("Slice backwards")
        index[axis] = slice(*slice(start, end, step).indices(x.meta["shape"][axis]))
    return g.emit(operator.getitem, x, tuple(index))


def _gather(g: Reader, node: ir.Node) -> fx.Node:
    """One constant position of an axis."""
    x = g.first_input(node)
    tensor = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
    if tensor is None or tensor.size != 1 or len(tensor.shape) or x.op == "get_attr":
        raise NoTorchCallError("Gather of several positions")
    return g.emit(torch.select, x, node.attributes.get_int("axis", 0), int(tensor.numpy()))


_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Cos": torch.cos, "Dropout": torch.clone, "Erf": torch.erf,
    "Exp": torch.exp, "HardSwish": F.hardswish, "Identity": torch.clone, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Reciprocal": torch.reciprocal, "Relu": F.relu,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tanh": torch.tanh,
}  # fmt: skip

OPERATIONS: dict[tuple[str, str], Translation] = {
    **{("", name): _unary(target) for name, target in _UNARY.items()},
    **LINEAR,
    ("", "Add"): _binary(torch.add, torch.add),
    ("", "Cast"): _cast,
    ("", "Celu"): _slope(F.celu, 1.0),
    ("", "Clip"): _clip,
    ("", "Div"): _binary(torch.div, torch.Tensor.__rdiv__),
    ("", "Elu"): _slope(F.elu, 1.0),
    ("", "Expand"): _expand,
    ("", "Flatten"): _reshape,
    ("", "Gather"): _gather,
    ("", "Gelu"): _gelu(),
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "LeakyRelu"): _slope(F.leaky_relu, 0.01),
    ("", "Max"): _extreme(torch.maximum, "min"),
    ("", "Min"): _extreme(torch.minimum, "max"),
    ("", "Mul"): _binary(torch.mul, torch.mul),
    ("", "Pow"): _binary(torch.pow, torch.Tensor.__rpow__),
    ("", "Reshape"): _reshape,
    ("", "Selu"): _selu,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Squeeze"): _reshape,
    ("", "Sub"): _binary(torch.sub, torch.rsub),
    ("", "Swish"): _swish(1.0),
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _reshape,
    (MS, "BiasGelu"): _gelu("none"),
    (MS, "FastGelu"): _gelu("tanh"),
    (MS, "Gelu"): _gelu("none"),
    (MS, "QuickGelu"): _swish(1.702),
}
