"""Recognise a linear map in a captured graph, however it is spelled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from upcycle.capture.recorder import op_name
from upcycle.passes.locate.behind import behind

# Operations that hand a parameter on without changing its numbers, but for transposition.
_TRANSPOSES = {"t", "T", "mT", "permute", "transpose"}
_PASSES = {"detach", "clone", "contiguous", "to", "float", "type_as", "data"}
_REPEATS = {"expand", "broadcast_to", "unsqueeze", "getitem"}  # for the batches of bmm
_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class LinearMap:
    """``y = x W^T + b`` along one axis of x.

    Attributes:
        node: the call.
        x: the node of its data input.
        weight, bias: names of parameters; the weight has none if it is not stored as it is.
        transposed: the weight is stored ``[in, out]``.
        axis: the axis of x and y that the map works along (1 for convolutions, else the last).
        packing: how the weight is stored where it is quantised, else empty.
        grouped: it is several maps, each of some of the features.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    axis: int
    packing: str = ""
    grouped: bool = False


@dataclass(frozen=True)
class _Parameter:
    name: str
    transposed: bool
    ndim: int


def parameter_of(arg: object) -> _Parameter | None:
    """The parameter behind a node, whether it was transposed on the way, and its dimensions."""
    if not isinstance(arg, fx.Node):
        return None
    if arg.op == "get_attr":
        name = arg.meta["parameter"]
        return _Parameter(name, False, len(arg.meta["shape"])) if name else None
    name = op_name(arg.target)
    if arg.op != "call_function" or len(arg.all_input_nodes) != 1 or not arg.args:
        return None
    if name not in _TRANSPOSES | _PASSES | _REPEATS:
        return None
    source = arg.args[0]
    found = parameter_of(source)
    if found is None:
        return None
    if name in _REPEATS:
        assert isinstance(source, fx.Node)
        return found if _same_matrix(arg, source, found.ndim) else None
    flips = name in _TRANSPOSES and arg.args[1:] not in (([0, 1],), ((0, 1),))
    if flips and found.ndim != 2:
        return None
    return _Parameter(found.name, found.transposed != flips, found.ndim)


def _same_matrix(node: fx.Node, source: fx.Node, ndim: int) -> bool:
    """Whether `node` only puts axes before a parameter, along which it is the same."""
    if op_name(node.target) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(i is not None and i is not Ellipsis and i != slice(None) for i in index):
            return False
    shapes = [n.meta["shape"][len(n.meta["shape"]) - ndim :] for n in (node, source)]
    return ndim > 0 and shapes[0] == shapes[1]


def linear_map(node: fx.Node) -> LinearMap | None:
    """The linear map that `node` applies to data with a parameter, or None.

    Known spellings: linear; addmm, baddbmm, mm, bmm, matmul, ``@`` and tensordot with a parameter
    on the right; einsum with one; convolutions with kernel size one, one group, stride one and no
    padding.
    """
    if node.op != "call_function":
        return None
    name = op_name(node.target)
    if name in _CONVOLUTIONS or name == "convolution":
        return convolution_of(node) if _reads_one_position(node) else None
    if name == "linear":
        x, weight, bias = _arguments(node, "input", "weight", "bias")
        return _make(node, x, weight, bias, transposed=False)
    if name in {"matmul", "mm", "bmm"}:
        x, weight = _arguments(node, "input", "other" if name == "matmul" else "mat2")
        return _make(node, x, weight, None, transposed=True)
    if name in {"addmm", "baddbmm"} and len(node.args) == 3 and not node.kwargs:
        bias, x, weight = node.args
        return _make(node, x, weight, bias, transposed=True)
    if name == "tensordot":
        return _tensordot(node)
    if name == "einsum":
        return _einsum(node)
    return None


def computed_linear(node: fx.Node) -> LinearMap | None:
    """A linear map whose weight no parameter holds as it is; the map's weight has no name.

    Either the forward computes the weight or the bias from parameters, or an operation of another
    library reads it in a form of its own.
    """
    if node.op != "call_function":
        return None
    if _library(node.target) not in {"", "aten", "prims"}:
        return _foreign(node)
    name = op_name(node.target)
    if name not in {"linear", "matmul", "mm", "addmm"}:
        return None
    x, weight, bias = (*node.args, *node.kwargs.values(), None)[:3]
    if name == "addmm":
        bias, x, weight = node.args[:3]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if x.op == "get_attr" or len(weight.meta["shape"]) != 2:
        return None
    computed = bias if parameter_of(weight) else weight
    stored = _stored_behind(computed) if isinstance(computed, fx.Node) else []
    if not stored:
        return None
    return LinearMap(node, x, "", None, False, -1, _packing(stored, weight.meta["shape"]))


def _stored_behind(node: fx.Node) -> list[fx.Node]:
    """The parameters that `node` is computed from; none if it is computed from other data, too."""
    leaves = behind([node])
    if any(leaf.op == "placeholder" for leaf in leaves):
        return []
    return [leaf for leaf in leaves if leaf.op == "get_attr" and leaf.meta["parameter"]]


def _library(target: Any) -> str:
    """Where an operation of torch.library comes from; empty for any other function."""
    if not isinstance(target, OpOverload | OpOverloadPacket):
        return ""
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return str(packet._qualified_op_name).partition("::")[0]


def _foreign(node: fx.Node) -> LinearMap | None:
    """An operator of another library that maps the last axis of one tensor, as linear maps do."""
    target: Any = node.target
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    operator = str(packet._qualified_op_name)
    inputs = [source for source in node.all_input_nodes if "shape" in source.meta]
    data = [source for source in inputs if source.op != "get_attr" and not _stored_behind(source)]
    if len(data) != 1:
        return None
    x, shape = data[0], node.meta.get("shape", ())
    if not shape or x.meta["shape"][:-1] != shape[:-1] or not x.meta["dtype"].is_floating_point:
        return None
    stored = [leaf for source in inputs if source is not x for leaf in _stored_behind(source)]
    if not stored and "linear" not in operator:
        return None
    packing = _packing(stored, (x.meta["shape"][-1], shape[-1])) or "packed"
    return LinearMap(node, x, "", None, False, -1, f"{packing} for `{operator}`")


def _packing(stored: list[fx.Node], shape: Sequence[int]) -> str:
    """``int4``, say, if the largest of the parameters holds a matrix of `shape` as integers.

    The size of the parameter gives the bits: eight numbers of four bits are one of 32.
    """
    whole = [leaf for leaf in stored if not leaf.meta["dtype"].is_floating_point]
    if not whole:
        return ""
    bits = max(8 * leaf.meta["dtype"].itemsize * math.prod(leaf.meta["shape"]) for leaf in whole)
    return f"int{round(bits / math.prod(shape))}"


def convolution_of(node: fx.Node) -> LinearMap | None:
    """A convolution of a batch with a parameter, whatever its kernel, as a map along axis 1."""
    name = op_name(node.target)
    if name not in _CONVOLUTIONS and name != "convolution":
        return None
    x, weight, bias = _arguments(node, "input", "weight", "bias")
    if not isinstance(x, fx.Node):
        return None
    dimensions = _CONVOLUTIONS.get(name, len(x.meta["shape"]) - 2)
    if len(x.meta["shape"]) != dimensions + 2 or _is_transposed(node):
        return None
    return _make(node, x, weight, bias, transposed=False, axis=1, ndim=dimensions + 2)


def _is_transposed(node: fx.Node) -> bool:
    """Of ATen's one operation for all convolutions: a deconvolution."""
    return op_name(node.target) == "convolution" and bool(node.args[6])


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    """The first arguments of a call, which have these names, wherever they were given."""
    return list(node.args[: len(names)]) + [node.kwargs.get(n) for n in names[len(node.args) :]]


def _make(
    node: fx.Node,
    x: object,
    weight: object,
    bias: object,
    *,
    transposed: bool,
    axis: int = -1,
    ndim: int = 2,
) -> LinearMap | None:
    found, found_bias = parameter_of(weight), parameter_of(bias)
    if found is None or found.ndim != ndim:
        return None
    if not isinstance(x, fx.Node) or parameter_of(x) is not None:
        return None
    if bias is not None and (found_bias is None or found_bias.ndim != 1):
        return None
    bias_name = found_bias.name if found_bias else None
    return LinearMap(node, x, found.name, bias_name, transposed != found.transposed, axis)


def _tensordot(node: fx.Node) -> LinearMap | None:
    """Over the last axis of the data and one of the weight."""
    x, weight, dims = _arguments(node, "a", "b", "dims")
    if not isinstance(x, fx.Node) or isinstance(dims, fx.Node):
        return None
    if dims == 1:
        dims = ([-1], [0])
    if not isinstance(dims, list | tuple) or any(len(_all(axes)) != 1 for axes in dims):
        return None
    (of_x,), (of_weight,) = map(_all, dims)
    if of_x % len(x.meta["shape"]) != len(x.meta["shape"]) - 1:
        return None
    return _make(node, x, weight, None, transposed=of_weight % 2 == 0)


def _einsum(node: fx.Node) -> LinearMap | None:
    """``...d,df->...f``, ``...d,fd->...f`` and ``bd...,df->bf...``, in any letters and order."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    data, _, weight = inputs.partition(",")
    if parameter_of(operands[0]) is not None:
        data, weight, operands = weight, data, operands[::-1]
    shared = set(data) & set(weight)
    if len(weight) != 2 or len(shared) != 1 or "." in weight or len(set(weight)) != 2:
        return None
    (old,) = shared
    new = weight.replace(old, "")
    if output != data.replace(old, new) or data.count(old) != 1:
        return None
    place = data.index(old)
    if data[-1] != old and (place != 1 or "." in data[:place]):
        return None
    axis = -1 if data[-1] == old else 1
    return _make(node, operands[0], operands[1], None, transposed=weight[0] == old, axis=axis)


def grouped_linear(node: fx.Node) -> LinearMap | None:
    """A convolution of each position by itself, in several groups, or None."""
    found = convolution_of(node) if node.op == "call_function" else None
    if found is None or not _reads_one_position(node, any_groups=True):
        return None
    return replace(found, grouped=True)


def _reads_one_position(node: fx.Node, *, any_groups: bool = False) -> bool:
    """Kernel one, stride one, no padding ("same" is no padding for kernel one), one group."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    _, weight, _, stride, padding, _, groups = _arguments(node, *names)
    if op_name(node.target) == "convolution":
        groups = node.args[8]
    if not isinstance(weight, fx.Node) or any(size != 1 for size in weight.meta["shape"][2:]):
        return False
    ones = all(v in (None, 1) for v in (*_all(stride), *_all(1 if any_groups else groups)))
    return ones and (isinstance(padding, str) or all(v in (None, 0) for v in _all(padding)))


def _all(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
