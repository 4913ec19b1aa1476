"""Activations that others add: operations that a program may have besides those of upcycle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch

from upcycle.errors import UsageError, one_line
from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.layers.installed import ACTIVATIONS as GROUP
from upcycle.pointwise import BUILT_IN, OPS
from upcycle.util.registry import Registry

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Activation:
    """A pointwise operation.

    Attributes:
        name: that of the operation in a model: ``sinc`` for ``torch.sinc``.
        function: the operation on a tensor of any shape and float dtype.
        onnx: makes its ONNX nodes: ``onnx(n, x)``, where ``n("Sin", x)`` is a node and
            ``n.const(2.0)`` a number; without it no ONNX file has the activation.
    """

    name: str
    function: Callable[..., torch.Tensor]
    onnx: Callable[..., Any] | None = None


REGISTRY: Registry[Activation] = Registry(
    "an activation", GROUP, tuple(dict.fromkeys((*BUILT_IN, *NAMED_POINTWISE)))
)


@overload
def register_activation(
    name: str, function: Function, *, onnx: Callable[..., Any] | None = None
) -> Function: ...
@overload
def register_activation(
    name: str, function: None = None, *, onnx: Callable[..., Any] | None = None
) -> Callable[[Function], Function]: ...
def register_activation(
    name: str, function: Any = None, *, onnx: Callable[..., Any] | None = None
) -> Any:
    """Let FFNs have a pointwise operation that upcycle does not know; also a decorator.

    Its neurons are then located, dealt out and converted as those of any other. Torch runs it;
    upcycle's own kernels and the fused nodes of ONNX Runtime do not have it.

    Args:
        name: as a recorded model calls the operation, which ``upcycle inspect`` shows for an FFN
            that it refuses; built of known operations, an activation needs no name.
        function: `f(x)` of a tensor, of its shape and dtype. A self-contained modeling file gets
            one of torch by its name, or the text of its module if that is plain.
        onnx: as `Activation` says.

    Raises:
        UsageError: the name is taken, or the function is not pointwise.
    """
    if function is None:
        return lambda given: register_activation(name, given, onnx=onnx)
    _check_pointwise(name, function)
    REGISTRY.register(name, Activation(name, function, onnx), function)
    OPS[name] = function
    return function


def _check_pointwise(name: str, function: Callable[..., torch.Tensor]) -> None:
    x = torch.linspace(-3, 3, 25)
    try:
        before = function(x.clone())
        moved = torch.stack([function(x + torch.eye(25)[i]) for i in range(25)])
    except Exception as error:
        reason = f"it fails on a tensor of 25 numbers: {type(error).__name__}: {one_line(error)}"
        raise UsageError(f"`{name}` is no activation: {reason}") from error
    if before.shape != x.shape or before.dtype != x.dtype:
        shape = f"{before.dtype} {list(before.shape)}"
        raise UsageError(f"`{name}` is no activation: it makes {shape} of float32 [25]")
    same = (moved == before) | (moved.isnan() & before.isnan()) | torch.eye(25).bool()
    if not same.all():
        raise UsageError(f"`{name}` is not pointwise: an element that was moved moved others")
