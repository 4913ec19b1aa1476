"""Each expert has the neurons that matter most to one domain, whoever else has them."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.gradient_domain import domain_ranks
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.split import split


def gradient_domain_overlap(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> torch.Tensor:
    """Give each expert the `width` most important neurons of its domain.

    The paper's *inner-sharing*. A neuron may be in several experts or in none, so the layer is
    approximate; with one expert it is the dense FFN.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E; `width` is F / E rounded up if ``experts.width`` does not say so.
        generator: unused.
        data: only ``importance_NF`` is read, of one domain for each expert.

    Returns:
        The neurons of each expert, [E, `width`], ascending.

    Source:
        Zhu et al., "LLaMA-MoE", 2024, section 3.1, https://arxiv.org/abs/2406.16554
    """
    best_EI = domain_ranks(spec, data).topk(spec.width, dim=1).indices
    return best_EI.sort(dim=1).values


GRADIENT_DOMAIN_OVERLAP = ExpertMethod(
    name="gradient_domain_overlap",
    kind="subsets",
    build=split(gradient_domain_overlap),
    paper='Zhu et al., "LLaMA-MoE", 2024',
    source="https://arxiv.org/abs/2406.16554",
    needs=frozenset({"gradients"}),
)
