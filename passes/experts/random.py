"""The neurons are dealt out at random."""

import torch

from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.partition import deal
from upcycle.spec import MoESpec
from upcycle.weights import ExpertWeights, FFNWeights, gather_experts


def random(ffn: FFNWeights, spec: MoESpec, *, generator: torch.Generator) -> ExpertWeights:
    """Cut a random permutation of the neurons into blocks.

    The dense output is the sum over all experts and the output bias, so the layer is exact when
    every expert is chosen with weight one; with fewer it drops neurons.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E, at most F; `width` is F / E rounded up.
        generator: draws the permutation.

    Returns:
        E experts of `width` neurons, the last ones padded with one neuron of zeros where E does
        not divide F. Memory: that of the dense FFN, and the padding.

    Source:
        Zhu et al., "LLaMA-MoE", 2024 (Independent, random), https://arxiv.org/abs/2406.16554
    """
    d_ff = ffn.up_MFD.shape[1]
    order_F = torch.randperm(d_ff, generator=generator)
    return gather_experts(ffn, deal(order_F, spec.num_experts, spec.width))


RANDOM = ExpertMethod(
    name="random",
    kind="split",
    build=random,
    paper='Zhu et al., "LLaMA-MoE", 2024',
    source="https://arxiv.org/abs/2406.16554",
)
