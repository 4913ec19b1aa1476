"""A random router that is never trained."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, drawn_rows, linear


def random_fixed(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw rows and biases from N(0, std^2) once and for all.

    The runtime router holds them as buffers: no optimizer sees them. Tokens still change experts in
    training, as what reaches the layer changes.

    Source:
        Chen et al., "Sparse MoE as the New Dropout" (SMoE-Dropout), 2023,
        https://arxiv.org/abs/2303.01610
    """
    spec = dense.spec
    weight_ED = drawn_rows(dense, spec.num_experts)
    bias_E = spec.router.std * torch.randn(spec.num_experts, generator=dense.generator)
    return linear(weight_ED, spec, bias_E)


RANDOM_FIXED = RouterMethod(
    name="random_fixed",
    build=random_fixed,
    bias=True,
    facts=lambda router, ffn, num_experts: {"frozen": True},
    reads=frozenset({"std"}),
)
