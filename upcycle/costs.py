"""What a plan costs, before a weight is read: parameters, FLOPs, bytes."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from upcycle.ffn import FFN
from upcycle.spec import MoESpec, Plan


@dataclass(frozen=True)
class Costs:
    """The size of a model before and after.

    Attributes:
        parameters_before, parameters_after: of the whole model.
        active_parameters: of those, the ones that a token meets.
        flops_before, flops_after: per token, in the linear maps of the converted FFNs and in their
            routers; a multiply-add is two.
        bytes_before, bytes_on_disk: of the dense and of the converted weights.
        peak_bytes: the dense model and the converted layers side by side.
    """

    parameters_before: int
    parameters_after: int
    active_parameters: int
    flops_before: int
    flops_after: int
    bytes_before: int
    bytes_on_disk: int
    peak_bytes: int

    def to_json(self) -> dict[str, int]:
        """Plain data for ``upcycle plan --json``."""
        return asdict(self)


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
    after = total_parameters - dense + layers
    return Costs(
        parameters_before=total_parameters,
        parameters_after=after,
        active_parameters=total_parameters - dense + active,
        flops_before=sum(2 * _multiply_adds(spec.ffn, spec.ffn.d_ff) for spec in specs),
        flops_after=sum(layer_flops(spec) for spec in specs),
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
    """Parameters of one MoE layer, counting `experts` of its experts and the whole router."""
    ffn = spec.ffn
    expert = _multiply_adds(ffn, spec.width)
    if any(p.bias for p in ffn.expansions):
        expert += len(ffn.expansions) * spec.width
    router = 0 if spec.router.tied else spec.num_experts * ffn.d_model
    if spec.router.bias:
        router += spec.num_experts
    return experts * expert + router + (ffn.d_out if ffn.contraction.bias else 0)


def layer_flops(spec: MoESpec) -> int:
    """FLOPs per token of one MoE layer: its chosen experts and its router."""
    router = spec.num_experts * spec.ffn.d_model
    return 2 * (spec.top_k * _multiply_adds(spec.ffn, spec.width) + router)


def _multiply_adds(ffn: FFN, neurons: int) -> int:
    """Multiply-adds per token of `neurons` neurons, which is also how many weights they have."""
    return neurons * (len(ffn.expansions) * ffn.d_model + ffn.d_out)
