"""A router that runs one neuron of each expert."""

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router


class NeuronsRouter(Router):
    """The score of an expert is ``|h|`` of the one neuron that stands for it.

    Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416
    """

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """The rows of the neurons in each expansion: `weight` [M, E, D], perhaps `bias` [M, E]."""
        self.pointwise = config.pointwise
        arity = self.pointwise.arity
        self.weight = nn.Parameter(torch.zeros(arity, rows, d_model))
        self.bias = nn.Parameter(torch.zeros(arity, rows)) if config.up_bias else None

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E]."""
        z = [F.linear(x_TD, weight_ED) for weight_ED in self.weight.to(x_TD.dtype)]
        if self.bias is not None:
            biases = self.bias.to(x_TD.dtype)
            z = [z_TE + bias_E for z_TE, bias_E in zip(z, biases, strict=True)]
        return self.pointwise(*z).abs()
