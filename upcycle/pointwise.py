"""The function between the two linear maps of an FFN, as data.

A dense FFN computes ``down(f(z_0, ..., z_m))`` with ``z_i = up_i(x)``. `f` is pointwise along the
hidden axis, which is what lets neurons be permuted, cut apart and copied. Here `f` is a short list
of steps, so that it can be compared, written to JSON, and run for any number of neurons.

A step is ``(op, args, kwargs)``. In `args`, the string ``"z1"`` is expansion 1 and ``"t0"`` is the
result of step 0; everything else is a constant. Only the names in `OPS` can run, so a file that
holds a program cannot hold code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def _cast(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(getattr(torch, dtype))


def _cast_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(like.dtype)


def _comparison(compare: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Ones and zeros in the dtype of the data: a step has no other type than a float."""
    return lambda x, y: compare(x, y).to(x.dtype)


def _where(condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
    return torch.where(condition != 0, x, y)


# Every operation that is known to be pointwise. `tests/test_pointwise.py` perturbs one element and
# checks for each entry that no other element moves.
OPS: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "add": torch.add,
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "cast": _cast,
    "cast_like": _cast_like,
    "ceil": torch.ceil,
    "celu": F.celu,
    "clamp": torch.clamp,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "div": torch.div,
    "elu": F.elu,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "floor": torch.floor,
    "ge": _comparison(torch.ge),
    "gelu": F.gelu,
    "gt": _comparison(torch.gt),
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "le": _comparison(torch.le),
    "leaky_relu": F.leaky_relu,
    "log": torch.log,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "logical_and": lambda x, y: x * y,
    "logical_not": lambda x: 1 - x,
    "logical_or": torch.maximum,
    "logsigmoid": F.logsigmoid,
    "lt": _comparison(torch.lt),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mish": F.mish,
    "mul": torch.mul,
    "neg": torch.neg,
    "pow": torch.pow,
    "reciprocal": torch.reciprocal,
    "relu": F.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "rsqrt": torch.rsqrt,
    "rsub": torch.rsub,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sub": torch.sub,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "threshold": F.threshold,
    "trunc": torch.trunc,
    "where": _where,
}


@dataclass(frozen=True)
class Pointwise:
    """``f(z_0, ..., z_{arity-1})``, pointwise; its result is the last step.

    `name` is the activation's usual name where it is a known one, else ``"custom"``.
    """

    arity: int
    steps: tuple[Step, ...]
    name: str = "custom"

    def __call__(self, *z: torch.Tensor) -> torch.Tensor:
        """Apply to `arity` tensors of one shape, any float dtype; returns that shape."""
        done: list[torch.Tensor] = []

        def value(arg: Any) -> Any:
            if isinstance(arg, str) and arg[0] in "zt" and arg[1:].isdigit():
                return (z if arg[0] == "z" else done)[int(arg[1:])]
            return arg

        for op, args, kwargs in self.steps:
            done.append(OPS[op](*(value(arg) for arg in args), **kwargs))
        return done[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        steps = [[op, list(args), dict(kwargs)] for op, args, kwargs in self.steps]
        return {"arity": self.arity, "name": self.name, "steps": steps}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Pointwise":
        """The program that `to_json` wrote; raises KeyError for an operation not in `OPS`."""
        for op, _, _ in data["steps"]:
            OPS[op]
        steps = tuple((op, tuple(args), dict(kwargs)) for op, args, kwargs in data["steps"])
        return Pointwise(arity=data["arity"], steps=steps, name=data["name"])
