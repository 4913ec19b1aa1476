"""A router that prefers no expert."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, linear


def zero(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Make every row zero: all experts have the same score for every token.

    So all tokens go to the same experts until training moves the rows, which the loss alone then
    decides. `method: normal` with a tiny ``std`` prefers as little and spreads the tokens.

    Args:
        ffn: only its input width D is read.
        parts: unused.
        spec: `num_experts` is E.
        generator: unused.
        data: unused.

    Returns:
        ``weight`` [E, D] and, if ``router.bias``, ``bias`` [E], all zeros; float32.

    Source:
        Zhu et al., "LLaMA-MoE", 2024, https://arxiv.org/abs/2406.16554
    """
    return linear(torch.zeros(spec.num_experts, ffn.up_MFD.shape[-1]), spec)


ZERO = RouterMethod(
    name="zero",
    build=zero,
    kinds=ALL_KINDS,
    otherwise="works with every expert method",
    paper='Zhu et al., "LLaMA-MoE", 2024',
    source="https://arxiv.org/abs/2406.16554",
)
