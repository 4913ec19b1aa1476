"""A router that runs every expert to find the best: what no router can beat."""

import torch

from upcycle.layers.config import RouterConfig
from upcycle.layers.experts import Experts
from upcycle.layers.router import Router


class OracleRouter(Router):
    """The score of an expert is the length of what it would add to the output.

    It costs more than the dense FFN, and serves to compare other routers with. It has no parameter.

    Zhang et al., "MoEfication", 2021, https://arxiv.org/abs/2110.01786
    """

    _experts: Experts

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """Nothing: the experts are those of the layer."""

    def attach(self, experts: Experts) -> None:  # type: ignore[override]
        """Remember the experts, without making them a part of the router."""
        object.__setattr__(self, "_experts", experts)

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E]."""
        experts = self._experts
        x_TD = x_TD.to(experts.down_proj.dtype)
        added = [experts.expert(e, x_TD) for e in range(self.num_experts)]
        return torch.stack([y_TO.float().norm(dim=-1) for y_TO in added], dim=-1)
