"""Give each layer as many neurons as are useful there; the sum over the layers stays as planned.

Shape suffixes: F neurons, S blocks of neurons.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from upcycle.ir.spec import MoESpec


def adaptive_shared(
    specs: tuple[MoESpec, ...], score_F: Mapping[str, torch.Tensor]
) -> tuple[MoESpec, ...]:
    """The specs with other numbers of shared neurons, whose sum stays.

    The scores of a layer, less its smallest, are divided by their sum, so that layers compare. Its
    neurons, ranked by score, form blocks of one neuron for each routed expert, and the blocks of
    the largest sums in the whole model become shared: as the blocks of one layer hold less and
    less, the shared experts then hold as much as they can. A layer keeps what its planned number is
    beyond whole blocks, so that no width gets padding that had none; and each routed expert keeps a
    neuron at least.

    `score_F` has how useful each neuron is by FFN path, larger is more.

    Source:
        the idea of a ratio for each layer is that of Zhao et al., "ExpertWeaver", 2026,
        https://arxiv.org/abs/2602.15521
    """
    blocks: list[tuple[float, int]] = []
    for i, spec in enumerate(specs):
        count = spec.num_experts
        part_F = score_F[spec.ffn.path].double().sort(descending=True).values
        part_F = part_F - part_F[-1]
        part_F = part_F / part_F.sum().clamp(min=torch.finfo(part_F.dtype).tiny)
        first = spec.shared % count
        most = max((spec.ffn.d_ff - first) // count - 1, 0)
        held_S = part_F[first : first + most * count].reshape(most, count).sum(1)
        blocks += [(-held, i) for held in held_S.tolist()]
    wanted = sum(spec.shared // spec.num_experts for spec in specs)
    taken = [i for _, i in sorted(blocks)[:wanted]]
    return tuple(_with_shared(spec, taken.count(i)) for i, spec in enumerate(specs))


def adaptive_widths(
    specs: tuple[MoESpec, ...], importance_F: Mapping[str, torch.Tensor]
) -> tuple[MoESpec, ...]:
    """The specs with other widths of the routed experts, whose sum stays up to rounding.

    The neurons of all layers are ranked together by what silencing them changes of the loss, and
    each layer gets as many as it has among the best: one bound for the whole model. Widths are
    multiples of 8, which kernels want, and an eighth of the planned one at least.

    `importance_F` has the mean ``|h dL/dh|`` of each neuron by FFN path.

    Source:
        one bound for all layers is how Molchanov et al., "Importance Estimation for Neural Network
        Pruning", 2019, https://arxiv.org/abs/1906.10771, prune
    """
    least = [max(spec.width // 64 * 8, 8) for spec in specs]
    most = [(spec.ffn.d_ff - spec.shared) // 8 * 8 for spec in specs]
    wanted = sum(spec.width for spec in specs) // 8
    blocks: list[tuple[float, int]] = []
    for i, spec in enumerate(specs):
        ranked_F = importance_F[spec.ffn.path].sort(descending=True).values[spec.shared :]
        held_B = ranked_F[least[i] : most[i]].reshape(-1, 8).sum(1)
        blocks += [(-held, i) for held in held_B.tolist()]
    taken = [i for _, i in sorted(blocks)[: max(wanted - sum(least) // 8, 0)]]
    widths = (8 * taken.count(i) + first for i, first in enumerate(least))
    return tuple(replace(spec, width=width) for spec, width in zip(specs, widths, strict=True))


def _with_shared(spec: MoESpec, blocks: int) -> MoESpec:
    count = spec.num_experts
    shared = spec.shared % count + blocks * count
    return replace(spec, shared=shared, width=-(-(spec.ffn.d_ff - shared) // count))
