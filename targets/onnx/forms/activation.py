"""`Pointwise` programs as ONNX nodes, in the dtype of the nodes."""

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from upcycle.errors import UnsupportedError
from upcycle.ir.activations import REGISTRY
from upcycle.onnx.nodes import Nodes
from upcycle.pointwise import Pointwise

Operation = Callable[..., ir.Value]


def _plain(op_type: str) -> Operation:
    return lambda n, *args: n(op_type, *args)


def _with_alpha(op_type: str) -> Operation:
    """A sum or a difference, whose second operand torch may multiply."""
    return lambda n, x, y, alpha=None: n(op_type, x, y if alpha is None else n("Mul", y, alpha))


def _div(n: Nodes, x: ir.Value, y: ir.Value, rounding_mode: None = None) -> ir.Value:
    if rounding_mode is not None:
        raise UnsupportedError(f"ONNX export of div(rounding_mode={rounding_mode!r}) is not there")
    return n("Div", x, y)


def _with_slope(op_type: str, argument: str, default: float) -> Operation:
    """An operation whose parameter is the attribute `alpha` of ONNX, not an input."""

    def build(n: Nodes, x: ir.Value, *args: float, **kwargs: float) -> ir.Value:
        slope = args[0] if args else kwargs.get(argument, default)
        return n(op_type, x, alpha=float(slope))

    return build


def _shrink(*, soft: bool) -> Operation:
    return lambda n, x, lambd=0.5: n("Shrink", x, lambd=float(lambd), bias=float(lambd) * soft)


def _softplus(
    n: Nodes, x: ir.Value, beta: ir.Value | None = None, threshold: float = 20.0
) -> ir.Value:
    scaled = x if beta is None else n("Mul", x, beta)
    soft = n("Softplus", scaled)
    if beta is not None:
        soft = n("Div", soft, beta)
    return n("Where", n("Greater", scaled, n.const(float(threshold))), x, soft)


def _gelu(n: Nodes, x: ir.Value, approximate: str = "none") -> ir.Value:
    """Spelled out: onnx's evaluator has no Gelu in a function. ONNX Runtime makes it one again."""
    if approximate == "tanh":
        cubic = n("Mul", n("Pow", x, n.const(3.0)), n.const(0.044715))
        inner = n("Tanh", n("Mul", n("Add", x, cubic), n.const(math.sqrt(2 / math.pi))))
        return n("Mul", n("Mul", x, n.const(0.5)), n("Add", inner, n.const(1.0)))
    inner = n("Erf", n("Div", x, n.const(math.sqrt(2))))
    return n("Mul", n("Mul", x, n("Add", inner, n.const(1.0))), n.const(0.5))


def _cast(n: Nodes, x: ir.Value, dtype: str) -> ir.Value:
    types = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
    if dtype == "float32":  # what a narrower graph would round again
        return x
    if dtype not in types:
        raise UnsupportedError(f"ONNX export of an activation with a cast to {dtype} is not there")
    return n("Cast", n("Cast", x, to=types[dtype].value), to=n.dtype.value)


def _comparison(op_type: str) -> Operation:
    return lambda n, x, y: n("Cast", n(op_type, x, y), to=n.dtype.value)


# Arguments that are attributes or choices, not numbers to compute with: by name, by operation.
_RAW = {"approximate", "rounding_mode", "dtype", "threshold"}
_RAW_OPS = {"cast", "celu", "elu", "hardshrink", "leaky_relu", "softshrink"}

# Operations of ONNX that have the name of torch.
_SAME_NAME = (
    *("Abs", "Acos", "Asin", "Asinh", "Atan", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor"),
    *("HardSwish", "Log", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Round", "Selu"),
    *("Sigmoid", "Sign", "Sin", "Sinh", "Softsign", "Sqrt", "Tan", "Tanh"),
)

OPERATIONS: dict[str, Operation] = {
    **{name.lower(): _plain(name) for name in _SAME_NAME},
    "add": _with_alpha("Add"),
    "cast": _cast,
    "cast_like": lambda n, x, like: x,
    "celu": _with_slope("Celu", "alpha", 1.0),
    "clamp": lambda n, x, min=None, max=None: n("Clip", x, min, max),
    "div": _div,
    "elu": _with_slope("Elu", "alpha", 1.0),
    "erfc": lambda n, x: n("Sub", n.const(1.0), n("Erf", x)),
    "exp2": lambda n, x: n("Pow", n.const(2.0), x),
    "expm1": lambda n, x: n("Sub", n("Exp", x), n.const(1.0)),
    "ge": _comparison("GreaterOrEqual"),
    "gelu": _gelu,
    "gt": _comparison("Greater"),
    "hardshrink": _shrink(soft=False),
    "hardsigmoid": lambda n, x: n("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    "hardtanh": lambda n, x, min_val=None, max_val=None: n(
        "Clip", x, min_val or n.const(-1.0), max_val or n.const(1.0)
    ),
    "le": _comparison("LessOrEqual"),
    "leaky_relu": _with_slope("LeakyRelu", "negative_slope", 0.01),
    "log10": lambda n, x: n("Div", n("Log", x), n.const(math.log(10))),
    "log1p": lambda n, x: n("Log", n("Add", x, n.const(1.0))),
    "log2": lambda n, x: n("Div", n("Log", x), n.const(math.log(2))),
    "logical_and": _plain("Mul"),
    "logical_not": lambda n, x: n("Sub", n.const(1.0), x),
    "logical_or": _plain("Max"),
    "logsigmoid": lambda n, x: n("Neg", n("Softplus", n("Neg", x))),
    "lt": _comparison("Less"),
    "maximum": _plain("Max"),
    "minimum": _plain("Min"),
    "relu6": lambda n, x: n("Clip", x, n.const(0.0), n.const(6.0)),
    "rsqrt": lambda n, x: n("Reciprocal", n("Sqrt", x)),
    "rsub": lambda n, x, y, alpha=None: _with_alpha("Sub")(n, y, x, alpha),
    "silu": lambda n, x: n("Mul", x, n("Sigmoid", x)),
    "softplus": _softplus,
    "softshrink": _shrink(soft=True),
    "square": lambda n, x: n("Mul", x, x),
    "sub": _with_alpha("Sub"),
    "tanhshrink": lambda n, x: n("Sub", x, n("Tanh", x)),
    "threshold": lambda n, x, threshold, value: n("Where", n("Greater", x, threshold), x, value),
    "trunc": lambda n, x: n("Mul", n("Sign", x), n("Floor", n("Abs", x))),
    "where": lambda n, condition, x, y: n(
        "Where", n("Cast", condition, to=ir.DataType.BOOL.value), x, y
    ),
}


def build(pointwise: Pointwise, n: Nodes, z: list[ir.Value]) -> ir.Value:
    """The nodes that compute `pointwise` of `z`.

    Raises:
        UnsupportedError: an operation, or an option of one, has no ONNX form.
    """
    done: list[ir.Value] = []

    def value(arg: Any, *, raw: bool) -> Any:
        if isinstance(arg, str) and arg[0] in "zt" and arg[1:].isdigit():
            return (z if arg[0] == "z" else done)[int(arg[1:])]
        if raw or arg is None:
            return arg
        return n.const(float(arg))

    for op, args, kwargs in pointwise.steps:
        added = REGISTRY.get(op)
        operation = OPERATIONS.get(op) if added is None else added.onnx
        if operation is None:
            raise UnsupportedError(
                f"the activation {pointwise.name!r} uses {op!r}, which has no ONNX form here; "
                "leave ONNX out of the targets, or register it with `onnx`"
            )
        raw = op in _RAW_OPS or added is not None
        given = {k: value(v, raw=raw or k in _RAW) for k, v in kwargs.items() if k != "inplace"}
        done.append(operation(n, *(value(arg, raw=raw) for arg in args), **given))
    return done[-1]
