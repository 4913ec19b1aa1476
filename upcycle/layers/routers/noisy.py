"""A linear router with noise of learned size in training."""

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router


class NoisyRouter(Router):
    """Scores ``W x + noise * (softplus(Wn x) + 0.01)`` in training, ``W x`` in evaluation.

    Shazeer et al., "Outrageously Large Neural Networks", 2017, https://arxiv.org/abs/1701.06538
    """

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """As the linear router, and `noise_weight` [E, D]."""
        super().make(rows, d_model, config)
        self.noise_weight = nn.Parameter(torch.zeros(rows, d_model))

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E]."""
        logits_TE = super().scores(x_TD)
        if not self.training:
            return logits_TE
        size_TE = F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype))) + 1e-2
        return logits_TE + size_TE * torch.randn_like(logits_TE)
