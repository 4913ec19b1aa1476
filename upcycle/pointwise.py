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


class Table(dict[str, Any]):
    """Names that have a meaning here; `find`, if there is one, may bring that of another name."""

    find: Callable[[str], object] | None = None

    def __missing__(self, name: str) -> Any:
        if self.find is not None:
            self.find(name)
        if name not in self:
            raise KeyError(name)
        return self[name]

    def has(self, name: str) -> bool:
        """Whether the name has a meaning, or gets one now."""
        try:
            return self[name] is not None
        except KeyError:
            return False


def _comparison(compare: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Ones and zeros in the dtype of the data: a step has no other type than a float."""
    return lambda x, y: compare(x, y).to(x.dtype)


_OF_TORCH = (
    *("abs", "ceil", "clamp", "floor", "maximum", "minimum", "neg", "round", "sign", "trunc"),
    *("acos", "asin", "asinh", "atan", "cos", "cosh", "sin", "sinh", "tan", "tanh"),
    *("add", "div", "mul", "pow", "reciprocal", "rsqrt", "rsub", "sqrt", "square", "sub"),
    *("erf", "erfc", "exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "sigmoid"),
)
_OF_FUNCTIONAL = (
    *("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
    *("logsigmoid", "mish", "relu", "relu6", "selu", "silu", "softplus", "softshrink"),
    *("softsign", "tanhshrink", "threshold"),
)
# Every operation that is known to be pointwise. `tests/test_pointwise.py` perturbs one element and
# checks for each entry that no other element moves. `upcycle.register_activation` adds to them.
BUILT_IN: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in _OF_TORCH},
    **{name: getattr(F, name) for name in _OF_FUNCTIONAL},
    **{name: _comparison(getattr(torch, name)) for name in ("ge", "gt", "le", "lt")},
    "cast": lambda x, dtype: x.to(getattr(torch, dtype)),
    "cast_like": lambda x, like: x.to(like.dtype),
    "logical_and": lambda x, y: x * y,
    "logical_not": lambda x: 1 - x,
    "logical_or": torch.maximum,
    "where": lambda condition, x, y: torch.where(condition != 0, x, y),
}
OPS = Table(BUILT_IN)


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
