"""Every expert is the whole FFN."""

import torch

from upcycle.activations import Activations
from upcycle.passes.experts.method import ExpertMethod, Parts
from upcycle.spec import MoESpec
from upcycle.weights import FFNWeights, gather_experts


def copy(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: Activations | None,
) -> Parts:
    """Repeat the dense FFN as every expert.

    The layer computes ``sum_k w_k FFN(x)``, so it is exact for every router and every top_k if the
    weights of the chosen experts sum to one.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E.
        generator: unused.
        data: unused.

    Returns:
        E experts of width F. Memory: E times the dense FFN.

    Source:
        Komatsuzaki et al., "Sparse Upcycling", 2022, https://arxiv.org/abs/2212.05055
    """
    d_ff = ffn.up_MFD.shape[1]
    return Parts(gather_experts(ffn, torch.arange(d_ff).repeat(spec.num_experts, 1)))


COPY = ExpertMethod(
    name="copy",
    kind="copies",
    build=copy,
    paper='Komatsuzaki et al., "Sparse Upcycling", 2022',
    source="https://arxiv.org/abs/2212.05055",
)
