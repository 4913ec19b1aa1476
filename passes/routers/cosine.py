"""A router that compares directions in a small space."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, no_bias, no_nulls


def cosine(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw a projection with orthonormal rows, and a direction for each expert in its image.

    The authors' code leaves the projection at zero, where every score is zero and its gradient is
    not finite in practice; an orthogonal one keeps lengths. Temperatures start at one.

    Returns:
        ``reduce`` [R, D], ``weight`` [E, R], ``temperature`` [E]; float32. R is ``router.hidden``,
        half of E if that is 0.

    Source:
        Cong et al., "GNT-MOVE", 2023, https://arxiv.org/abs/2308.11793
    """
    spec, width = dense.spec, dense.spec.router_config().hidden
    drawn_DR = torch.randn(dense.d_model, width, generator=dense.generator)
    reduce_RD = torch.linalg.qr(drawn_DR).Q.t().contiguous()
    weight_ER = torch.randn(spec.num_experts, width, generator=dense.generator)
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
    makes="cosine",
    facts=lambda router, ffn, num_experts: {"hidden": router.hidden or max(num_experts // 2, 1)},
    reads=frozenset({"hidden"}),
    limits=(no_nulls, no_bias),
)
