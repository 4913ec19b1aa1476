"""The neurons are dealt out at random."""

import torch

from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import deal, split


def random(dense: DenseLayer) -> torch.Tensor:
    """Cut a random permutation into blocks; exact when every expert is chosen with weight one.

    Source:
        Zhu et al., "LLaMA-MoE", 2024 (Independent, random), https://arxiv.org/abs/2406.16554
    """
    order_F = torch.randperm(dense.d_ff, generator=dense.generator)
    return deal(order_F, dense.spec.num_experts, dense.spec.width)


RANDOM = ExpertMethod(name="random", kind="split", build=split(random))
