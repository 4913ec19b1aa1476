"""What a plan costs, before a weight is read: parameters, FLOPs, bytes."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from upcycle.ir.layer_weights import empty_layer
from upcycle.ir.measured import Costs
from upcycle.ir.spec import MoESpec, Plan
from upcycle.recipe.schema import Compensate


def costs(plan: Plan, total_parameters: int, itemsize: int) -> Costs:
    """The costs of a plan for a model of `total_parameters`, stored in `itemsize` bytes each."""
    specs, ffns = plan.specs, [spec.ffn for spec in plan.specs]
    dense = sum(ffn.num_parameters for ffn in ffns)
    layers = sum(layer_parameters(spec, spec.num_experts) for spec in specs)
    active = sum(layer_parameters(spec, spec.top_k) for spec in specs)
    plain = [replace(spec, compensate=Compensate()) for spec in specs]
    bare = sum(layer_parameters(spec, spec.num_experts) for spec in plain)
    flops = sum(layer_flops(spec) for spec in specs)
    after = total_parameters - dense + layers
    return Costs(
        parameters_before=total_parameters,
        parameters_after=after,
        active_parameters=total_parameters - dense + active,
        flops_before=sum(2 * spec.ffn.num_weights for spec in specs),
        flops_after=flops,
        compensation_parameters=layers - bare,
        compensation_flops=flops - sum(layer_flops(spec) for spec in plain),
        bytes_before=total_parameters * itemsize,
        bytes_on_disk=after * itemsize,
        peak_bytes=(total_parameters + layers) * itemsize,
        flops_left_dense=sum(2 * ffn.num_weights for ffn in plan.located.ffns if ffn not in ffns),
    )


def model_size(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and the bytes of one of them as its checkpoint stores it."""
    parameters = list(model.parameters())
    stored = getattr(getattr(model, "config", None), "dtype", None)
    if not isinstance(stored, torch.dtype):
        stored = parameters[0].dtype if parameters else torch.float32
    return sum(p.numel() for p in parameters), stored.itemsize


def layer_parameters(spec: MoESpec, experts: int) -> int:
    """Parameters of one MoE layer, counting `experts` of its routed experts and all the rest."""
    parameters = empty_layer(spec.layer_config()).named_parameters()
    return _counting(experts, spec, dict(parameters))


def layer_flops(spec: MoESpec) -> int:
    """FLOPs per token of one MoE layer, in its linear maps: two for each weight that a token uses.

    Counted with `top_k` routed experts, which is the most that a token visits under some rules of
    selection, and the mean under others.
    """
    state = empty_layer(spec.layer_config()).state_dict()
    weights = {
        name: tensor
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.ndim > 1 and not name.endswith("bias")
    }
    return 2 * _counting(spec.top_k, spec, weights)


def _counting(experts: int, spec: MoESpec, tensors: Mapping[str, torch.Tensor]) -> int:
    """The numbers in `tensors`, of which the routed experts have equal parts."""
    routed = sum(t.numel() for name, t in tensors.items() if name.startswith("experts."))
    every = sum(t.numel() for t in tensors.values())
    return every - routed + routed // spec.num_experts * experts
