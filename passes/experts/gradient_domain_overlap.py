"""Each expert has the neurons that matter most to one domain, whoever else has them."""

import torch

from upcycle.passes.experts.gradient_domain import domain_ranks
from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import split


def gradient_domain_overlap(dense: DenseLayer) -> torch.Tensor:
    """Give each expert the `width` most important neurons of its domain.

    The paper's *inner-sharing*. A neuron may be in several experts or in none, so the layer is
    approximate; with one expert it is the dense FFN.

    Source:
        Zhu et al., "LLaMA-MoE", 2024, section 3.1, https://arxiv.org/abs/2406.16554
    """
    best_EI = domain_ranks(dense).topk(dense.spec.width, dim=1).indices
    return best_EI.sort(dim=1).values


GRADIENT_DOMAIN_OVERLAP = ExpertMethod(
    name="gradient_domain_overlap",
    kind="subsets",
    build=split(gradient_domain_overlap),
    needs="gradients",
)
