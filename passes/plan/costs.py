"""What a plan costs, before a weight is read: parameters, FLOPs, bytes."""

from dataclasses import replace

import torch
from torch import nn

from upcycle.ir.ffn import FFN
from upcycle.ir.layer_weights import empty_layer
from upcycle.ir.measured import Costs
from upcycle.ir.spec import MoESpec, Plan
from upcycle.recipe.schema import Compensate

ROUTED = ("experts.up_proj", "experts.gate_up_proj", "experts.down_proj")


def costs(plan: Plan, total_parameters: int, itemsize: int) -> Costs:
    """The costs of a plan.

    Args:
        plan: what is converted.
        total_parameters: parameters of the dense model.
        itemsize: bytes of one number of the stored weights.
    """
    specs = plan.specs
    dense = sum(spec.ffn.num_parameters for spec in specs)
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
        flops_before=sum(2 * _multiply_adds(spec.ffn, spec.ffn.d_ff) for spec in specs),
        flops_after=flops,
        compensation_parameters=layers - bare,
        compensation_flops=flops - sum(layer_flops(spec) for spec in plain),
        bytes_before=total_parameters * itemsize,
        bytes_on_disk=after * itemsize,
        peak_bytes=(total_parameters + layers) * itemsize,
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
    parameters = dict(empty_layer(spec.layer_config()).named_parameters())
    sizes = {name: tensor.numel() for name, tensor in parameters.items()}
    routed = sum(size for name, size in sizes.items() if name.startswith("experts."))
    return sum(sizes.values()) - routed + routed // spec.num_experts * experts


def layer_flops(spec: MoESpec) -> int:
    """FLOPs per token of one MoE layer, in its linear maps: two for each weight that a token meets.

    Counted with `top_k` routed experts, which is the most that a token visits under some rules of
    selection, and the mean under others.
    """
    state = empty_layer(spec.layer_config()).state_dict()
    linear = {n: t for n, t in state.items() if t.is_floating_point() and not n.endswith("bias")}
    weights = {name: tensor.numel() for name, tensor in linear.items() if tensor.ndim > 1}
    routed = {name: size for name, size in weights.items() if name in ROUTED}
    every = sum(weights.values()) - sum(routed.values())
    visited = sum(routed.values()) // spec.num_experts * spec.top_k
    return 2 * int(every + visited)


def _multiply_adds(ffn: FFN, neurons: int) -> int:
    """Multiply-adds per token of `neurons` neurons, which is also how many weights they have."""
    return neurons * (len(ffn.expansions) * ffn.d_model + ffn.d_out)
