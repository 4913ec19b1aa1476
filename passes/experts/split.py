"""What all splits have in common: neurons for every token first, then groups of the others."""

import functools
from typing import Protocol

import torch

from upcycle.activations import Activations
from upcycle.passes.experts.method import BuildExperts, Parts
from upcycle.spec import MoESpec
from upcycle.weights import FFNWeights, gather_experts


class GroupNeurons(Protocol):
    """Deals the neurons of an FFN to experts: int64 [E, I], each neuron once, -1 as padding."""

    def __call__(
        self,
        ffn: FFNWeights,
        spec: MoESpec,
        *,
        generator: torch.Generator,
        data: Activations | None,
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
        data: Activations | None,
    ) -> Parts:
        if not spec.shared:
            return Parts(gather_experts(ffn, group(ffn, spec, generator=generator, data=data)))
        score_F = usefulness(ffn, spec.experts.shared_by, data, markers=spec.experts.markers)
        order_F = score_F.argsort(descending=True, stable=True)
        shared_S = order_F[: spec.shared].sort().values
        rest_F = order_F[spec.shared :].sort().values
        few = None if data is None else data.of_neurons(rest_F)
        local_EI = group(ffn.of_neurons(rest_F), spec, generator=generator, data=few)
        neuron_EI = torch.where(local_EI < 0, local_EI, rest_F[local_EI.clamp(min=0)])
        return Parts(gather_experts(ffn, neuron_EI), gather_experts(ffn, shared_S[None]))

    return build


def usefulness(ffn: FFNWeights, by: str, data: Activations | None, *, markers: int) -> torch.Tensor:
    """How much every token would miss each neuron, [F]; larger is more.

    ``first`` prefers low numbers; ``norm`` is the product of the lengths of its rows and its
    column; ``contribution`` the mean of ``|h|`` times the length of its column; ``rate`` the
    part of the tokens in which it is among the `markers` largest ``|h|``; ``importance`` the mean
    ``|h dL/dh|``.
    """
    length_F: torch.Tensor = ffn.down_OF.float().norm(dim=0)
    if by == "first":
        return -torch.arange(len(length_F), dtype=torch.float32)
    if by == "norm":
        up_F: torch.Tensor = ffn.up_MFD.float().norm(dim=-1).prod(0)
        return length_F * up_F
    assert data is not None, "`passes.needs` asks for it"
    if by == "importance":
        assert data.importance_NF is not None
        return data.importance_NF.mean(0)
    total_F = torch.zeros_like(length_F)
    for _, h_TF in data.hidden(ffn):
        if by == "rate":
            top_TK = h_TF.abs().topk(min(markers, h_TF.shape[1]), dim=-1).indices
            total_F += torch.bincount(top_TK.flatten(), minlength=len(total_F))
        else:
            total_F += h_TF.abs().sum(0) * length_F
    return total_F / max(len(data), 1)
