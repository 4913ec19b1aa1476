"""Whether two functions of one or two arguments are the same, judged by their values."""

from collections.abc import Callable
from functools import cache

import torch

from upcycle.pointwise import Pointwise

# The kernels that stand for a program compute in float32, to a few roundings; some models write
# the constants of an activation with eight digits, which moves it by less. The two nearest of the
# activations that have names differ by 5e-4.
TOLERANCE = 12 * torch.finfo(torch.float32).eps
# Where activations bend; then far out, where some are cut off: ReLU6 is a ReLU up to 6.
_GRIDS = (
    torch.linspace(-12, 12, 193, dtype=torch.float64),
    *(torch.tensor([-far, 0, far], dtype=torch.float64) for far in (15, 25, 100, 1e4, 1e15)),
)


def same_function(
    a: Pointwise, b: Callable[..., torch.Tensor], tolerance: float = TOLERANCE
) -> bool:
    """Whether the values of `a` and `b` in float64 are within ``tolerance * (1 + |b|)``.

    A `Pointwise` `b` may have another arity; any other `b` takes as many arguments as `a`.
    """
    if isinstance(b, Pointwise) and b.arity != a.arity:
        return False
    z = _points(a.arity)
    return torch.allclose(a(*z).double(), b(*z).double(), rtol=tolerance, atol=tolerance)


@cache
def _points(arity: int) -> tuple[torch.Tensor, ...]:
    grids = [torch.meshgrid(*[grid] * arity, indexing="ij") for grid in _GRIDS]
    return tuple(torch.cat([z.flatten() for z in axis]) for axis in zip(*grids, strict=True))
