"""What all splits have in common: neurons for every token first, then groups of the others."""

import functools
from collections.abc import Callable

import torch

from upcycle.ir.weights import FFNWeights, gather_experts
from upcycle.passes.experts.method import BuildExperts, DenseLayer, Parts
from upcycle.passes.experts.useful import usefulness

# Makes the neurons of each expert, int64 [E, I], -1 as padding, from a layer without the neurons of
# the shared expert.
GroupNeurons = Callable[[DenseLayer], torch.Tensor]


def split(group: GroupNeurons) -> BuildExperts:
    """The expert method that gives every token the shared neurons and routes the groups.

    The dense output is the sum over all experts, the shared one and the output bias. So where each
    neuron is in one expert, the layer is exact when every expert is chosen with weight one; with
    fewer it drops neurons. Memory: that of the dense FFN, and the padding.
    """

    @functools.wraps(group)
    def build(dense: DenseLayer) -> Parts:
        if not dense.spec.shared:
            return Parts(gather_experts(dense.ffn, group(dense)))
        shared_S, rest_F = shared_neurons(dense)
        return split_parts(dense.ffn, shared_S, rest_F, group(dense.of_neurons(rest_F)))

    return build


def shared_neurons(dense: DenseLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The `spec.shared` most useful neurons and the others, ascending, int64 [S] and [F - S]."""
    spec = dense.spec
    score_F = usefulness(dense.ffn, spec.experts, dense.calibration, width=spec.width)
    order_F = score_F.argsort(descending=True, stable=True)
    return order_F[: spec.shared].sort().values, order_F[spec.shared :].sort().values


def split_parts(
    ffn: FFNWeights, shared_S: torch.Tensor, rest_F: torch.Tensor, local_EI: torch.Tensor
) -> Parts:
    """The parts of a split whose groups [E, I] are numbered within `rest_F`; -1 is padding."""
    neuron_EI = torch.where(local_EI < 0, local_EI, rest_F[local_EI.clamp(min=0)])
    shared = gather_experts(ffn, shared_S[None]) if len(shared_S) else None
    return Parts(gather_experts(ffn, neuron_EI), shared)
