"""A small random router with bounded rows."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, linear


def uniform(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Draw every number from U(-a, a), independently; ``a = sqrt(3) std``.

    ``torch.nn.Linear`` does the same with ``std = 1 / sqrt(3 D)``.

    Args:
        ffn: only its input width D is read.
        parts: unused.
        spec: `num_experts` is E; ``router.std`` is the standard deviation.
        generator: draws the rows.
        data: unused.

    Returns:
        ``weight`` [E, D] and, if ``router.bias``, ``bias`` of zeros [E]; float32.

    Source:
        Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233
    """
    shape = (spec.num_experts, ffn.up_MFD.shape[-1])
    drawn_ED = 2 * torch.rand(shape, generator=generator) - 1
    return linear(3**0.5 * spec.router.std * drawn_ED, spec)


UNIFORM = RouterMethod(
    name="uniform",
    build=uniform,
    kinds=ALL_KINDS,
    otherwise="works with every expert method",
    paper='Zeng et al., "AdaMoE", 2024',
    source="https://arxiv.org/abs/2406.13233",
    reads=frozenset({"std"}),
)
