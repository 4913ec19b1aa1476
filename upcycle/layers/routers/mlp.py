"""A router of two linear maps."""

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router


class MLPRouter(Router):
    """Scores ``W2 tanh(W1 x / |x|)``.

    Zhang et al., "MoEfication", 2021, https://arxiv.org/abs/2110.01786
    """

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """`weight_in` [H, D] and `weight_out` [E, H], and perhaps `bias` [E]."""
        self.weight_in = nn.Parameter(torch.zeros(config.hidden, d_model))
        self.weight_out = nn.Parameter(torch.zeros(rows, config.hidden))
        self.bias = nn.Parameter(torch.zeros(rows)) if config.bias else None

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E]."""
        hidden_TH = F.linear(F.normalize(x_TD, dim=-1), self.weight_in.to(x_TD.dtype)).tanh()
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(hidden_TH, self.weight_out.to(x_TD.dtype), bias)
