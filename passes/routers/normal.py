"""A small random router."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, linear


def normal(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Draw every row from N(0, std^2), independently.

    Says nothing about the input yet: tokens are spread over the experts by chance, and stay with
    their experts from step to step, which is what lets copies grow apart in training.

    Args:
        ffn: the dense FFN; only its input width D is read.
        parts: unused.
        spec: `num_experts` is E; ``router.std`` is the standard deviation.
        generator: draws the rows.
        data: unused.

    Returns:
        ``weight`` [E, D] and, if ``router.bias``, ``bias`` of zeros [E]; float32.

    Source:
        Komatsuzaki et al., "Sparse Upcycling", 2022, https://arxiv.org/abs/2212.05055
    """
    shape = (spec.num_experts, ffn.up_MFD.shape[-1])
    weight_ED = spec.router.std * torch.randn(shape, generator=generator)
    return linear(weight_ED, spec)


NORMAL = RouterMethod(
    name="normal",
    build=normal,
    kinds=ALL_KINDS,
    otherwise="works with every expert method",
    paper='Komatsuzaki et al., "Sparse Upcycling", 2022',
    source="https://arxiv.org/abs/2212.05055",
    reads=frozenset({"std"}),
)
