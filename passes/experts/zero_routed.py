"""The FFN stays as the shared expert, and the routed experts add nothing yet."""

from collections.abc import Iterator

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.weights import gather_experts
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts
from upcycle.passes.experts.split import deal
from upcycle.recipe.schema import Recipe


def zero_routed(dense: DenseLayer) -> Parts:
    """Keep the FFN for every token, and route experts whose contraction is zero beside it.

    The layer computes ``FFN(x) + sum_k w_k E_k(x)`` with ``E_k = 0``, so it is exact for every
    router, weight rule and top_k. In the first step of training only the contractions of the
    experts have a gradient; their expansions and the router follow once those are not zero.

    Returns:
        The FFN as the shared expert, and E experts of width I, the F neurons over
        ``experts.granularity``. Expert e has the expansions of slice ``e mod granularity`` of the
        FFN. Memory: ``1 + E * I / F`` times the dense FFN.

    Source:
        The layer is the residual one of Rajbhandari et al., "DeepSpeed-MoE", 2022,
        https://arxiv.org/abs/2201.05596
    """
    neuron_F, slices = torch.arange(dense.d_ff), dense.spec.experts.granularity
    slice_E = torch.arange(dense.spec.num_experts) % slices
    neuron_EI = deal(neuron_F, slices, dense.spec.width)[slice_E]
    experts = gather_experts(dense.ffn, neuron_EI, down_scale=0.0)
    return Parts(experts, gather_experts(dense.ffn, neuron_F[None]))


def _refuse(ffn: FFN, recipe: Recipe) -> Iterator[str]:
    slices = recipe.experts.granularity
    if slices > ffn.d_ff:
        yield (
            f"{ffn.d_ff} neurons cannot be cut into {slices} slices; "
            f"set `experts.granularity` to {ffn.d_ff} or less"
        )


ZERO_ROUTED = ExpertMethod(name="zero_routed", kind="residual", build=zero_routed, refuse=_refuse)
