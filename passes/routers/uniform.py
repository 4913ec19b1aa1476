"""A small random router with bounded rows."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, linear


def uniform(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw every number from U(-a, a), independently; ``a = sqrt(3) router.std``.

    ``torch.nn.Linear`` does the same with ``std = 1 / sqrt(3 D)``.

    Source:
        Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233
    """
    spec = dense.spec
    drawn_ED = 2 * torch.rand(spec.num_experts, dense.d_model, generator=dense.generator) - 1
    return linear(3**0.5 * spec.router.std * drawn_ED, spec)


UNIFORM = RouterMethod(name="uniform", build=uniform, reads=frozenset({"std"}))
