"""A small random router."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, drawn_rows, linear


def normal(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw every row from N(0, std^2), independently.

    Says nothing about the input yet: tokens are spread over the experts by chance, and stay with
    their experts from step to step, which is what lets copies grow apart in training.

    Source:
        Komatsuzaki et al., "Sparse Upcycling", 2022, https://arxiv.org/abs/2212.05055
    """
    return linear(drawn_rows(dense, dense.spec.num_experts), dense.spec)


NORMAL = RouterMethod(name="normal", build=normal, reads=frozenset({"std"}))
