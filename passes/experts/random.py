"""The neurons are dealt out at random."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.partition import deal
from upcycle.passes.experts.split import split


def random(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> torch.Tensor:
    """Cut a random permutation of the neurons into blocks.

    The dense output is the sum over all experts and the output bias, so the layer is exact when
    every expert is chosen with weight one; with fewer it drops neurons.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E, at most F; `width` is F / E rounded up.
        generator: draws the permutation.
        data: unused.

    Returns:
        The neurons of each expert, [E, `width`], -1 as padding where E does not divide F. Memory
        of the experts: that of the dense FFN, and the padding.

    Source:
        Zhu et al., "LLaMA-MoE", 2024 (Independent, random), https://arxiv.org/abs/2406.16554
    """
    d_ff = ffn.up_MFD.shape[1]
    order_F = torch.randperm(d_ff, generator=generator)
    return deal(order_F, spec.num_experts, spec.width)


RANDOM = ExpertMethod(
    name="random",
    kind="split",
    build=split(random),
    paper='Zhu et al., "LLaMA-MoE", 2024',
    source="https://arxiv.org/abs/2406.16554",
)
