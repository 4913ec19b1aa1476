"""A router that compares directions in a small space."""

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router


class CosineRouter(Router):
    """Scores ``cos(R x, w_e) / temperature_e``: they do not depend on the length of a token.

    Cong et al., "GNT-MOVE", 2023, https://arxiv.org/abs/2308.11793
    """

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """`reduce` [R, D], `weight` [E, R] and `temperature` [E]."""
        self.reduce = nn.Parameter(torch.zeros(config.hidden, d_model))
        self.weight = nn.Parameter(torch.zeros(rows, config.hidden))
        self.temperature = nn.Parameter(torch.ones(rows))

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E]."""
        small_TR = F.normalize(F.linear(x_TD, self.reduce.to(x_TD.dtype)), dim=-1)
        unit_ER = F.normalize(self.weight.to(x_TD.dtype), dim=-1)
        return F.linear(small_TR, unit_ER) / self.temperature.to(x_TD.dtype)
