"""A model in float16 or bfloat16, for an ONNX file that computes in it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from upcycle.layers.moe import MoE


def narrowed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in `dtype`, but for its routers, which choose experts in float32."""
    model = copy.deepcopy(model)
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    kept = {id(t) for router in routers for t in (*router.parameters(), *router.buffers())}

    def cast(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in kept or not tensor.is_floating_point() else tensor.to(dtype)

    model._apply(cast)  # type: ignore[no-untyped-call]
    return model


def narrowed_inputs(
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...], dtype: torch.dtype
) -> Mapping[str, Tensor] | tuple[Tensor, ...]:
    """The inputs of such a model."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(inputs, Mapping):
        return {name: cast(tensor) for name, tensor in inputs.items()}
    return tuple(cast(tensor) for tensor in inputs)
