"""A router that compares directions in a small space."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, no_bias, no_nulls


def cosine(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Draw a projection with orthonormal rows, and a direction for each expert in its image.

    The authors' code leaves the projection at zero, where every score is zero and its gradient is
    not finite in practice; an orthogonal one keeps lengths. Temperatures start at one.

    Args:
        ffn: only its input width D is read.
        parts: unused.
        spec: `num_experts` is E; ``router.hidden`` is R, half of E if 0.
        generator: draws both.
        data: unused.

    Returns:
        ``reduce`` [R, D], ``weight`` [E, R], ``temperature`` [E]; float32.

    Source:
        Cong et al., "GNT-MOVE", 2023, https://arxiv.org/abs/2308.11793
    """
    d_model, width = ffn.up_MFD.shape[-1], spec.router_config().hidden
    drawn_DR = torch.randn(d_model, width, generator=generator)
    reduce_RD = torch.linalg.qr(drawn_DR).Q.t().contiguous()
    weight_ER = torch.randn(spec.num_experts, width, generator=generator)
    return {
        "reduce": reduce_RD,
        "weight": torch.nn.functional.normalize(weight_ER, dim=-1),
        "temperature": torch.ones(spec.num_experts),
    }


COSINE = RouterMethod(
    name="cosine",
    build=cosine,
    kinds=ALL_KINDS - {"slices"},
    otherwise="gives each expert a direction of its own, which tears the slices of a copy apart; "
    "use `router.method: virtual_group`",
    paper='Cong et al., "GNT-MOVE", 2023',
    source="https://arxiv.org/abs/2308.11793",
    makes="cosine",
    facts=lambda router, ffn, num_experts: {"hidden": router.hidden or max(num_experts // 2, 1)},
    reads=frozenset({"hidden"}),
    limits=(no_nulls, no_bias),
)
