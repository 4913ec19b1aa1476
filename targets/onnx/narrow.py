"""A model in float16 or bfloat16, for an ONNX file that computes in it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from upcycle.layers.moe import MoE
from upcycle.targets.onnx.axes import Inputs


def narrowed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in `dtype`, but for its routers, which choose experts in float32."""
    model = copy.deepcopy(model)
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    single = {id(t) for router in routers for t in (*router.parameters(), *router.buffers())}

    def cast(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and id(tensor) not in single
        return tensor.to(dtype) if is_cast else tensor

    model._apply(cast)  # type: ignore[no-untyped-call]
    return model


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their floats in `dtype`."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(inputs, Mapping):
        return {name: cast(tensor) for name, tensor in inputs.items()}
    return tuple(cast(tensor) for tensor in inputs)
