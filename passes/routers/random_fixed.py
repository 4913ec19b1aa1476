"""A random router that is never trained."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, linear


def random_fixed(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Draw rows and biases from N(0, std^2) once and for all.

    The runtime router holds them as buffers: no optimizer sees them. Tokens still change experts in
    training, as what reaches the layer changes.

    Args:
        ffn: only its input width D is read.
        parts: unused.
        spec: `num_experts` is E; ``router.std`` is the standard deviation.
        generator: draws the rows, then the biases.
        data: unused.

    Returns:
        ``weight`` [E, D] and, unless ``router.bias`` is off, ``bias`` [E]; float32.

    Source:
        Chen et al., "Sparse MoE as the New Dropout" (SMoE-Dropout), 2023,
        https://arxiv.org/abs/2303.01610
    """
    shape = (spec.num_experts, ffn.up_MFD.shape[-1])
    weight_ED = spec.router.std * torch.randn(shape, generator=generator)
    bias_E = spec.router.std * torch.randn(spec.num_experts, generator=generator)
    return linear(weight_ED, spec, bias_E)


RANDOM_FIXED = RouterMethod(
    name="random_fixed",
    build=random_fixed,
    kinds=ALL_KINDS,
    otherwise="works with every expert method",
    paper='Chen et al., "SMoE-Dropout", 2023',
    source="https://arxiv.org/abs/2303.01610",
    bias=True,
    facts=lambda router, ffn, num_experts: {"frozen": True},
    reads=frozenset({"std"}),
)
