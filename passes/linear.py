"""Recognise a linear map in a captured graph, however it is spelled."""

from dataclasses import dataclass

from torch import fx

from upcycle.capture import op_name

# Operations that hand a parameter on without changing its numbers, but for transposition.
_TRANSPOSES = {"t", "T", "mT", "transpose"}
_PASSES = {"detach", "clone", "contiguous", "to", "float", "type_as", "data", "requires_grad"}


@dataclass(frozen=True)
class LinearMap:
    """``y = x W^T + b`` along one axis of x.

    Attributes:
        node: the call.
        x: the node of its data input.
        weight, bias: names of parameters.
        transposed: the weight is stored ``[in, out]``.
        axis: the axis of x and y that the map works along (1 for convolutions, else the last).
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    axis: int


def parameter_of(arg: object) -> tuple[str, bool] | None:
    """The parameter behind a node, and whether it was transposed on the way."""
    if not isinstance(arg, fx.Node):
        return None
    if arg.op == "get_attr":
        return (arg.meta["parameter"], False) if arg.meta["parameter"] else None
    name = op_name(arg.target)
    if arg.op != "call_function" or name not in _TRANSPOSES | _PASSES:
        return None
    found = parameter_of(arg.args[0])
    if found is None:
        return None
    return (found[0], found[1] != (name in _TRANSPOSES))


def linear_map(node: fx.Node) -> LinearMap | None:
    """The linear map that `node` applies to data with a parameter, or None if it is none.

    Known spellings: linear; addmm, mm, matmul and ``@`` with a parameter on the right;
    convolutions with kernel size one, one group, stride one and no padding.
    """
    if node.op != "call_function":
        return None
    name, args = op_name(node.target), list(node.args)
    bias: object = None
    axis, transposed = -1, False
    if name == "linear":
        x, weight, bias = (*args, node.kwargs.get("bias"))[:3] if len(args) < 3 else args[:3]
    elif name in {"matmul", "mm"} and len(args) == 2:
        (x, weight), transposed = args, True
    elif name == "addmm" and not node.kwargs:
        (bias, x, weight), transposed = args, True
    elif name in {"conv1d", "conv2d", "conv3d"} and len(args) >= 2 and _is_pointwise_conv(node):
        x, weight, bias, axis = args[0], args[1], (args[2] if len(args) > 2 else None), 1
    else:
        return None
    found = parameter_of(weight)
    if found is None or not isinstance(x, fx.Node) or parameter_of(x) is not None:
        return None
    bias_found = parameter_of(bias)
    if bias is not None and bias_found is None:
        return None
    bias_name = bias_found[0] if bias_found else None
    return LinearMap(node, x, found[0], bias_name, transposed != found[1], axis)


def _is_pointwise_conv(node: fx.Node) -> bool:
    shape = node.args[1].meta["shape"] if isinstance(node.args[1], fx.Node) else ()
    defaults = (1, 0, 1, 1)  # stride, padding, dilation, groups
    names = ("stride", "padding", "dilation", "groups")
    given = [node.kwargs.get(n, d) for n, d in zip(names, defaults, strict=True)]
    for i, value in enumerate(node.args[3:]):
        given[i] = value
    plain = all(
        all(v == d for v in (value if isinstance(value, tuple | list) else [value]))
        for value, d in zip(given, defaults, strict=True)
    )
    return plain and all(size == 1 for size in shape[2:])
