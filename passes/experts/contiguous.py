"""Expert e gets the e-th block of neurons, in stored order."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.partition import deal
from upcycle.passes.experts.split import split


def contiguous(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> torch.Tensor:
    """Cut the neurons into consecutive blocks.

    The dense output is the sum over all experts and the output bias, so the layer is exact when
    every expert is chosen with weight one; with fewer it drops neurons.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E, at most F; `width` is F / E rounded up.
        generator: unused.
        data: unused.

    Returns:
        The neurons of each expert, [E, `width`], -1 as padding where E does not divide F. Memory
        of the experts: that of the dense FFN, and the padding.

    Source:
        Zhao et al., "FactorLLM", 2024, https://arxiv.org/abs/2408.11855
    """
    d_ff = ffn.up_MFD.shape[1]
    return deal(torch.arange(d_ff), spec.num_experts, spec.width)


CONTIGUOUS = ExpertMethod(
    name="contiguous",
    kind="split",
    build=split(contiguous),
    paper='Zhao et al., "FactorLLM", 2024',
    source="https://arxiv.org/abs/2408.11855",
)
