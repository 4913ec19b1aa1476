"""`Pointwise` programs as ONNX nodes, in float32."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from upcycle.errors import UnsupportedError
from upcycle.pointwise import Pointwise
from upcycle.targets.onnx.nodes import Nodes

Operation = Callable[..., ir.Value]


def _plain(op_type: str) -> Operation:
    return lambda n, *args: n(op_type, *args)


def _sum(n: Nodes, x: ir.Value, y: ir.Value, alpha: ir.Value | None = None) -> ir.Value:
    return n("Add", x, y if alpha is None else n("Mul", y, alpha))


def _sub(n: Nodes, x: ir.Value, y: ir.Value, alpha: ir.Value | None = None) -> ir.Value:
    return n("Sub", x, y if alpha is None else n("Mul", y, alpha))


def _div(n: Nodes, x: ir.Value, y: ir.Value, rounding_mode: None = None) -> ir.Value:
    if rounding_mode is not None:
        raise UnsupportedError(f"ONNX export of div(rounding_mode={rounding_mode!r}) is not there")
    return n("Div", x, y)


def _clip(
    n: Nodes, x: ir.Value, min: ir.Value | None = None, max: ir.Value | None = None
) -> ir.Value:
    return n("Clip", x, min, max)


def _hardtanh(
    n: Nodes, x: ir.Value, min_val: ir.Value | None = None, max_val: ir.Value | None = None
) -> ir.Value:
    return n("Clip", x, min_val or n.const(-1.0), max_val or n.const(1.0))


def _with_slope(op_type: str, argument: str, default: float) -> Operation:
    """An op of ONNX whose parameter is the attribute `alpha`, not an input."""

    def build(n: Nodes, x: ir.Value, *args: float, **kwargs: float) -> ir.Value:
        slope = args[0] if args else kwargs.get(argument, default)
        return n(op_type, x, alpha=float(slope))

    return build


def _softplus(
    n: Nodes, x: ir.Value, beta: ir.Value | None = None, threshold: float = 20.0
) -> ir.Value:
    scaled = x if beta is None else n("Mul", x, beta)
    soft = n("Softplus", scaled)
    soft = soft if beta is None else n("Div", soft, beta)
    return n("Where", n("Greater", scaled, n.const(float(threshold))), x, soft)


def _silu(n: Nodes, x: ir.Value) -> ir.Value:
    return n("Mul", x, n("Sigmoid", x))


def _gelu(n: Nodes, x: ir.Value, approximate: str = "none") -> ir.Value:
    return n("Gelu", x, approximate=approximate)


def _cast(n: Nodes, x: ir.Value, dtype: str) -> ir.Value:
    types = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
    if dtype == "float32":
        return x
    if dtype not in types:
        raise UnsupportedError(f"ONNX export of an activation with a cast to {dtype} is not there")
    return n("Cast", n("Cast", x, to=types[dtype].value), to=ir.DataType.FLOAT.value)


def _comparison(op_type: str) -> Operation:
    return lambda n, x, y: n("Cast", n(op_type, x, y), to=ir.DataType.FLOAT.value)


def _where(n: Nodes, condition: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return n("Where", n("Cast", condition, to=ir.DataType.BOOL.value), x, y)


# Keyword and positional arguments that are attributes or choices, and not numbers to compute with.
_RAW = {"approximate", "rounding_mode", "dtype", "threshold"}
_RAW_OPS = {"cast", "celu", "elu", "leaky_relu"}

OPERATIONS: dict[str, Operation] = {
    "abs": _plain("Abs"),
    "add": _sum,
    "cast": _cast,
    "cast_like": lambda n, x, like: x,
    "celu": _with_slope("Celu", "alpha", 1.0),
    "clamp": _clip,
    "cos": _plain("Cos"),
    "div": _div,
    "elu": _with_slope("Elu", "alpha", 1.0),
    "erf": _plain("Erf"),
    "exp": _plain("Exp"),
    "expm1": lambda n, x: n("Sub", n("Exp", x), n.const(1.0)),
    "ge": _comparison("GreaterOrEqual"),
    "gelu": _gelu,
    "gt": _comparison("Greater"),
    "hardsigmoid": lambda n, x: n("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    "hardswish": _plain("HardSwish"),
    "hardtanh": _hardtanh,
    "le": _comparison("LessOrEqual"),
    "leaky_relu": _with_slope("LeakyRelu", "negative_slope", 0.01),
    "log": _plain("Log"),
    "log1p": lambda n, x: n("Log", n("Add", x, n.const(1.0))),
    "logical_and": _plain("Mul"),
    "logical_not": lambda n, x: n("Sub", n.const(1.0), x),
    "logical_or": _plain("Max"),
    "logsigmoid": lambda n, x: n("Neg", n("Softplus", n("Neg", x))),
    "lt": _comparison("Less"),
    "maximum": _plain("Max"),
    "minimum": _plain("Min"),
    "mish": _plain("Mish"),
    "mul": _plain("Mul"),
    "neg": _plain("Neg"),
    "pow": _plain("Pow"),
    "reciprocal": _plain("Reciprocal"),
    "relu": _plain("Relu"),
    "relu6": lambda n, x: n("Clip", x, n.const(0.0), n.const(6.0)),
    "rsqrt": lambda n, x: n("Reciprocal", n("Sqrt", x)),
    "rsub": lambda n, x, y, alpha=None: _sub(n, y, x, alpha),
    "selu": _plain("Selu"),
    "sigmoid": _plain("Sigmoid"),
    "sign": _plain("Sign"),
    "silu": _silu,
    "sin": _plain("Sin"),
    "softplus": _softplus,
    "softsign": _plain("Softsign"),
    "sqrt": _plain("Sqrt"),
    "square": lambda n, x: n("Mul", x, x),
    "sub": _sub,
    "tanh": _plain("Tanh"),
    "tanhshrink": lambda n, x: n("Sub", x, n("Tanh", x)),
    "where": _where,
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
        if op not in OPERATIONS:
            raise UnsupportedError(
                f"the activation {pointwise.name!r} uses {op!r}, which has no ONNX form here; "
                "leave ONNX out of the targets"
            )
        raw = op in _RAW_OPS
        given = {k: value(v, raw=raw or k in _RAW) for k, v in kwargs.items() if k != "inplace"}
        done.append(OPERATIONS[op](n, *(value(arg, raw=raw) for arg in args), **given))
    return done[-1]
