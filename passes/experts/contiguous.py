"""Expert e gets the e-th block of neurons, in stored order."""

import torch

from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import deal, split


def contiguous(dense: DenseLayer) -> torch.Tensor:
    """Cut the neurons into consecutive blocks; exact when every expert is chosen with weight one.

    Source:
        Zhao et al., "FactorLLM", 2024, https://arxiv.org/abs/2408.11855
    """
    return deal(torch.arange(dense.d_ff), dense.spec.num_experts, dense.spec.width)


CONTIGUOUS = ExpertMethod(name="contiguous", kind="split", build=split(contiguous))
