"""The FFN stays as the shared expert, and the routed experts add nothing yet."""

from collections.abc import Iterator

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, gather_experts
from upcycle.passes.experts.method import ExpertMethod, Parts
from upcycle.passes.experts.partition import deal
from upcycle.recipe.schema import Recipe


def zero_routed(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> Parts:
    """Keep the FFN for every token, and route experts whose contraction is zero beside it.

    The layer computes ``FFN(x) + sum_k w_k E_k(x)`` with ``E_k = 0``, so it is exact for every
    router, weight rule and top_k. In the first step of training only the contractions of the
    experts have a gradient; their expansions and the router follow once those are not zero.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E; `width` is I, the F neurons over ``experts.granularity``.
        generator: unused.
        data: unused.

    Returns:
        The FFN as the shared expert, and E experts of width I. Expert e has the expansions of
        slice ``e mod granularity`` of the FFN. Memory: ``1 + E * I / F`` times the dense FFN.

    Source:
        The layer is the residual one of Rajbhandari et al., "DeepSpeed-MoE", 2022,
        https://arxiv.org/abs/2201.05596
    """
    neuron_F = torch.arange(ffn.up_MFD.shape[1])
    slices = spec.experts.granularity
    slice_E = torch.arange(spec.num_experts) % slices
    neuron_EI = deal(neuron_F, slices, spec.width)[slice_E]
    experts = gather_experts(ffn, neuron_EI, down_scale=0.0)
    return Parts(experts, gather_experts(ffn, neuron_F[None]))


def _refuse(ffn: FFN, recipe: Recipe) -> Iterator[str]:
    slices = recipe.experts.granularity
    if slices > ffn.d_ff:
        yield (
            f"{ffn.d_ff} neurons cannot be cut into {slices} slices; "
            f"set `experts.granularity` to {ffn.d_ff} or less"
        )


ZERO_ROUTED = ExpertMethod(
    name="zero_routed",
    kind="residual",
    build=zero_routed,
    paper='Rajbhandari et al., "DeepSpeed-MoE", 2022',
    source="https://arxiv.org/abs/2201.05596",
    refuse=_refuse,
)
