"""How a split deals the neurons of an FFN: those for every token, then groups of the others."""

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


def membership(neuron_EI: torch.Tensor, d_ff: int) -> torch.Tensor:
    """1 where expert e holds neuron f, [E, F] float32; a negative number is no neuron."""
    member_EF = torch.zeros(len(neuron_EI), d_ff + 1)
    # Padding and neurons drawn anew go to an extra column.
    member_EF.scatter_(1, torch.where(neuron_EI < 0, d_ff, neuron_EI), 1.0)
    return member_EF[:, :d_ff]


def group_sizes(d_ff: int, count: int) -> list[int]:
    """`count` sizes that sum to `d_ff`, the longer ones first; they differ by at most one."""
    short, longer = divmod(d_ff, count)
    return [short + (group < longer) for group in range(count)]


def deal(order_F: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Deal neurons to `count` experts: `group_sizes` consecutive ones of `order_F` to each.

    Returns [count, width] int64; -1 fills the short groups. Neurons are in ascending order within
    a group, so that one partition has one layout.
    """
    neuron_EI = torch.full((count, width), -1, dtype=torch.int64)
    start = 0
    for row_I, size in zip(neuron_EI, group_sizes(len(order_F), count), strict=True):
        row_I[:size] = order_F[start : start + size].sort().values
        start += size
    return neuron_EI


def by_turns(order_F: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """As `deal`, but like cards: expert e gets neurons e, e + count, ... of `order_F`."""
    turns = [order_F[expert::count] for expert in range(count)]
    return deal(torch.cat(turns), count, width)
