"""The experts of a layer as one operation of torch, ``upcycle::moe``.

``torch.compile`` and ``torch.export`` see one node, whose shapes do not depend on the routing.

Shape suffixes: those of `upcycle.kernels`.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from upcycle.kernels.activations import of_pointwise
from upcycle.kernels.torch_cpu import KernelWeights, visit
from upcycle.pointwise import Pointwise


def run_as_one_node(
    experts: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """``upcycle::moe`` of an `upcycle.layers.experts.Experts`."""
    parameters = (experts.up_EGD, experts.up_bias_EG, experts.down_proj, experts.program)
    given = (x_TD, index_TK, weights_TK, *parameters, experts.down_bias_EO)
    y_TO: torch.Tensor = torch.ops.upcycle.moe(*given)
    return y_TO


@lru_cache(maxsize=256)
def activation(program: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], str | None]:
    """The activation that `Pointwise.to_json` describes, on expansions side by side; its name."""
    pointwise = Pointwise.from_json(json.loads(program))

    def activate(z_TG: torch.Tensor) -> torch.Tensor:
        return pointwise(*z_TG.chunk(pointwise.arity, dim=-1))

    return activate, of_pointwise(pointwise.name, pointwise.arity)


def moe(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    program: str,
    down_bias_EO: torch.Tensor | None = None,
) -> torch.Tensor:
    """What ``torch.ops.upcycle.moe`` computes; `program` is the activation, see `activation`.

    Returns:
        [T, O], in the dtype of `x_TD`.
    """
    biases = (up_bias_EG, down_EOI, down_bias_EO)
    weights = KernelWeights(up_EGD, *biases, *activation(program), None)
    return visit(weights, x_TD, index_TK, weights_TK)


def moe_backward(grad_TO: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    """The gradients of ``moe(*given)`` by its float tensors; it is computed again."""

    def leaf(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if is_float else value

    with torch.enable_grad():
        again = [leaf(value) for value in given]
        y_TO = moe(*again)
        leaves = [t for t in again if isinstance(t, torch.Tensor) and t.requires_grad]
        if not y_TO.requires_grad:  # no expert is visited
            return [t.new_zeros(t.shape) for t in leaves]
        found = torch.autograd.grad(y_TO, leaves, grad_TO, materialize_grads=True)
    return [gradient.contiguous() for gradient in found]  # as a compiler was promised


def _moe_shape(x_TD: torch.Tensor, *given: Any) -> torch.Tensor:
    down_EOI = given[4]
    return x_TD.new_empty(x_TD.shape[0], down_EOI.shape[1])


def _backward_shapes(grad_TO: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    tensors = [t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return [t.new_empty(t.shape) for t in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.program, down_bias_EO = inputs
    ctx.save_for_backward(*tensors, down_bias_EO)


def _gradients(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, down_bias_EO = ctx.saved_tensors
    given = (*tensors, ctx.program, down_bias_EO)
    found = iter(torch.ops.upcycle.moe_backward(grad_TO, *given))
    floats = [isinstance(t, torch.Tensor) and t.is_floating_point() for t in given]
    return tuple(next(found) if is_float else None for is_float in floats)


_GIVEN = (
    "Tensor x, Tensor index, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, str program, "
    "Tensor? down_bias=None"
)

if not hasattr(torch.ops.upcycle, "moe"):  # the file of a converted model has this text, too
    torch.library.define("upcycle::moe", f"({_GIVEN}) -> Tensor")
    torch.library.define("upcycle::moe_backward", f"(Tensor grad, {_GIVEN}) -> Tensor[]")
    torch.library.impl("upcycle::moe", "cpu", moe)
    torch.library.impl("upcycle::moe_backward", "cpu", moe_backward)
    torch.library.register_fake("upcycle::moe", _moe_shape)
    torch.library.register_fake("upcycle::moe_backward", _backward_shapes)
    torch.library.register_autograd("upcycle::moe", _gradients, setup_context=_keep)
