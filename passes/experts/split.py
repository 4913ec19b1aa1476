"""What all splits have in common: neurons for every token first, then groups of the others."""

import functools
from typing import Protocol

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, gather_experts
from upcycle.passes.experts.method import BuildExperts, Parts
from upcycle.passes.experts.useful import usefulness


class GroupNeurons(Protocol):
    """Deals the neurons of an FFN to experts: int64 [E, I], each neuron once, -1 as padding."""

    def __call__(
        self,
        ffn: FFNWeights,
        spec: MoESpec,
        *,
        generator: torch.Generator,
        data: FFNInputs | None,
    ) -> torch.Tensor:
        """Group the neurons of `ffn`, which lacks those of the shared expert."""
        ...


def split(group: GroupNeurons) -> BuildExperts:
    """The expert method that gives every token the shared neurons and routes the groups."""

    @functools.wraps(group)
    def build(
        ffn: FFNWeights,
        spec: MoESpec,
        *,
        generator: torch.Generator,
        data: FFNInputs | None,
    ) -> Parts:
        if not spec.shared:
            return Parts(gather_experts(ffn, group(ffn, spec, generator=generator, data=data)))
        shared_S, rest_F = shared_neurons(ffn, spec, data)
        few = None if data is None else data.of_neurons(rest_F)
        local_EI = group(ffn.of_neurons(rest_F), spec, generator=generator, data=few)
        return split_parts(ffn, shared_S, rest_F, local_EI)

    return build


def shared_neurons(
    ffn: FFNWeights, spec: MoESpec, data: FFNInputs | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `spec.shared` most useful neurons and the others, ascending, int64 [S] and [F - S]."""
    score_F = usefulness(ffn, spec.experts, data, width=spec.width)
    order_F = score_F.argsort(descending=True, stable=True)
    return order_F[: spec.shared].sort().values, order_F[spec.shared :].sort().values


def split_parts(
    ffn: FFNWeights, shared_S: torch.Tensor, rest_F: torch.Tensor, local_EI: torch.Tensor
) -> Parts:
    """The parts of a split whose groups [E, I] are numbered within `rest_F`; -1 is padding."""
    neuron_EI = torch.where(local_EI < 0, local_EI, rest_F[local_EI.clamp(min=0)])
    shared = gather_experts(ffn, shared_S[None]) if len(shared_S) else None
    return Parts(gather_experts(ffn, neuron_EI), shared)
