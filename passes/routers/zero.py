"""A router that prefers no expert."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, linear


def zero(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Make every row zero: all experts have the same score for every token.

    So all tokens go to the same experts until training moves the rows, which the loss alone then
    decides. `method: normal` with a tiny ``std`` prefers as little and spreads the tokens.

    Source:
        Zhu et al., "LLaMA-MoE", 2024, https://arxiv.org/abs/2406.16554
    """
    return linear(torch.zeros(dense.spec.num_experts, dense.d_model), dense.spec)


ZERO = RouterMethod(name="zero", build=zero)
