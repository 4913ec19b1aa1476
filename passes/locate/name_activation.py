"""The usual names of activations, recognised by what they compute.

A program is compared with each known function on a grid in float64, so every spelling of one
function gets one name: Bloom's hand-written GELU and ``F.gelu(approximate="tanh")`` are the same.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from upcycle.pointwise import Pointwise

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "mish": F.mish,
}
_GATED = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "sigmoid_glu": "sigmoid",
}

# Some models write the constants of an activation with eight digits. A name is given where float32,
# the precision of the fused kernels that need names, cannot tell the functions apart: one eps at
# values up to 12. The program itself is what runs. The two nearest entries differ by 5e-4.
_TOLERANCE = 12 * torch.finfo(torch.float32).eps
# Where activations bend; and far out, where some are cut off: ReLU6 is a ReLU up to 6.
_BENDS = torch.linspace(-6, 6, 241, dtype=torch.float64)
_FAR = torch.tensor([-100, -25, -15, -9, -7, 7, 9, 15, 25, 100], dtype=torch.float64)


def recognise(program: Pointwise) -> Pointwise:
    """The same program with its name, if it is a known one; a gate must be argument 0."""
    exact = _without_casts(program)
    z = torch.cat([_FAR, _BENDS])
    if program.arity == 1:
        for name, function in _PLAIN.items():
            if _equal(exact(z), function(z)):
                return Pointwise(1, program.steps, name)
    if program.arity == 2:
        gate, up = torch.meshgrid(z, z.flip(0) / 3, indexing="ij")
        if _equal(exact(gate, up), gate * up):
            return Pointwise(2, program.steps, "bilinear")
        for name, plain in _GATED.items():
            if _equal(exact(gate, up), _PLAIN[plain](gate) * up):
                return Pointwise(2, program.steps, name)
    return program


def _without_casts(program: Pointwise) -> Pointwise:
    """A rounding on the way (an activation computed in float32) does not change the name."""
    steps = tuple(("add", (args[0], 0), {}) if op in {"cast", "cast_like"} else (op, args, kw)
                  for op, args, kw in program.steps)  # fmt: skip
    return Pointwise(program.arity, steps)


def _equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    gap = (actual.double() - expected).abs() / (expected.abs() / 12).clamp(min=1)
    return bool(gap.max() <= _TOLERANCE)


def swapped(program: Pointwise) -> Pointwise:
    """The same function with its two arguments exchanged."""
    flip = {"z0": "z1", "z1": "z0"}

    def rename(arg: object) -> object:
        return flip.get(arg, arg) if isinstance(arg, str) else arg

    steps = tuple(
        (op, tuple(rename(a) for a in args), kwargs) for op, args, kwargs in program.steps
    )
    return Pointwise(program.arity, steps)
