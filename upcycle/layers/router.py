"""The router of an MoE layer: how tokens find their experts.

A router is three things, which combine freely: *scores* for each token and expert (this class and
its subclasses in `upcycle.layers.routers`), a *selection* of experts (`upcycle.layers.selection`),
and a *rule* for the weights of the selected ones.

Shape suffixes: T tokens, D d_model, E experts, K chosen experts at most.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.layers.config import RouterConfig, WeightRule
from upcycle.layers.selection import Selected, everything, select

_OWN = frozenset(("forward", "scores", "choose", "_weigh"))  # methods that may be replaced


class Router(nn.Module):
    """Chooses experts for each token by scores that are linear in it.

    The scores are computed in float32 (float64 for float64 tokens). Weight rules, with p the
    softmax over all experts and S the chosen set:

    - ``renormalised``: p / sum of p over S. Sums to one.
    - ``softmax``: p. Sums to less than one.
    - ``one``: 1 for each chosen expert.
    - ``renorm_detach``: as renormalised, without a gradient through the sum, so that the task
      trains the router even while all experts are equal.
    - ``gain``: 1 + g p with one trained g per expert, which starts at zero
      (Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416).

    While all weights are one, whatever the scores, their gradient is that of p: it goes straight
    through, unless a token visits all experts, where there is nothing to learn.
    (Zhao et al., "FactorLLM", 2024, https://arxiv.org/abs/2408.11855)

    ``scale`` multiplies the weights. With ``balance`` a bias, which is no parameter, is added to p
    for the selection and not for the weights, and may be moved to spread the load
    (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024, https://arxiv.org/abs/2408.15664).
    In training the layer counts its load, and `rebalance` moves the bias.

    A ``frozen`` linear router has no parameter, so it is not trained and no optimizer knows it
    (Chen et al., "SMoE-Dropout", 2023, https://arxiv.org/abs/2303.01610). The rows of a
    ``tied`` one are the mean expert keys (the rows that the activation reads), refreshed on every
    training step (Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908).
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.weights = config.weights
        self.scale = config.scale
        self.tied = config.tied
        self.all_experts = False
        self.load_E: torch.Tensor | None = None
        rows = self.num_experts + config.nulls
        self.make(rows, config.d_model, config)
        if config.balance:
            self.register_buffer("selection_bias", torch.zeros(rows))
        if self.weights == "gain":
            self.gain = nn.Parameter(torch.zeros(self.num_experts))

    weight: torch.Tensor
    bias: torch.Tensor | None
    selection_bias: torch.Tensor

    @property
    def top_k(self) -> int:
        """K, as the configuration has it; to set it changes that."""
        return self.config.select.k

    @top_k.setter
    def top_k(self, k: int) -> None:
        self.config = replace(self.config, select=replace(self.config.select, k=k))

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        """Make the parameters that `scores` reads, for `rows` experts."""
        frozen = config.frozen
        self._put("weight", torch.zeros(rows, d_model), frozen=self.tied or frozen)
        self._put("bias", torch.zeros(rows) if config.bias else None, frozen=frozen)

    def _put(self, name: str, tensor: torch.Tensor | None, *, frozen: bool) -> None:
        if frozen:
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def attach(self, experts: nn.Module) -> None:
        """Keep the experts of the layer, which only the scores of an oracle read."""

    def stand_in(self, count: int) -> None:
        """Prepare for `count` tokens of a layer that is run outside its model."""

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens in float32 or float64 -> logits [T, E] (null experts last)."""
        weight, bias = self.weight, self.bias
        if weight.dtype != x_TD.dtype:  # a cast takes its time even if there is nothing to do
            weight, bias = weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype)
        return F.linear(x_TD, weight, bias)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits [T, E], weights [T, K] and index [T, K] of the chosen experts.

        The logits are those that the selection used, null experts last. A token that visits fewer
        than K experts has zeros among its weights.
        """
        logits_TE = self.scores(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))
        if self.all_experts:
            true_TE = logits_TE[..., : self.num_experts]
            index_TK, _ = everything(true_TE, k=self.num_experts)
            return logits_TE, torch.ones_like(true_TE), index_TK
        index_TK, mask_TK = self.choose(logits_TE)
        weights_TK = self._weigh(logits_TE, index_TK, mask_TK)
        if self.training and self.config.balance:
            self._count(index_TK, mask_TK)
        return logits_TE, weights_TK * self.scale, index_TK

    def as_linear(self) -> tuple[torch.Tensor, torch.Tensor | None, int, WeightRule, float] | None:
        """Weight, bias, K, rule and scale where these are all that `forward` computes with, in
        evaluation, without a hook and without a replaced method; else None."""
        if self.training or self.all_experts or not self._has_kernel():
            return None
        if self._forward_hooks or self._forward_pre_hooks or not _OWN.isdisjoint(self.__dict__):
            return None
        if (Router.forward, Router.scores, Router.choose, Router._weigh) != _METHODS:
            return None
        return self.weight, self.bias, self.top_k, self.weights, self.scale

    def _has_kernel(self) -> bool:
        """Whether it is what kernels compute: `renorm_detach` has another gradient."""
        fits = self.weights != "renorm_detach" and 0 < self.top_k <= self.num_experts
        return fits and type(self) is Router and self.config.is_plain

    def selection_scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """What the experts of a token are the best by: the logits, or p with the bias, [T, E]."""
        if not self.config.balance:
            return logits_TE
        return logits_TE.softmax(-1) + self.selection_bias.to(logits_TE.dtype)

    def choose(self, logits_TE: torch.Tensor) -> Selected:
        """The experts of each token, as `upcycle.layers.selection` describes them."""
        return select(self.selection_scores(logits_TE), self.config.select)

    @torch.no_grad()
    def _count(self, index_TK: torch.Tensor, mask_TK: torch.Tensor | None) -> None:
        visits_TK = torch.ones_like(index_TK) if mask_TK is None else mask_TK.to(index_TK.dtype)
        load_E = index_TK.new_zeros(self.num_experts)
        load_E = load_E.index_add(0, index_TK.reshape(-1), visits_TK.reshape(-1))
        self.load_E = load_E if self.load_E is None else self.load_E + load_E

    @torch.no_grad()
    def rebalance(self, rate: float = 1e-3) -> None:
        """Move the selection bias by `rate` towards even load, and reset the load.

        To be called after each optimizer step. Experts that were visited less than the mean since
        the last call go up, the others down; null experts stay. Only training in this process is
        counted.
        """
        load_E, self.load_E = self.load_E, None
        if load_E is not None:
            mean = load_E.double().mean()
            self.selection_bias[: self.num_experts] += rate * (mean - load_E).sign()

    def _weigh(
        self, logits_TE: torch.Tensor, index_TK: torch.Tensor, mask_TK: torch.Tensor | None
    ) -> torch.Tensor:
        if self.weights == "one":
            weights_TK = torch.ones_like(index_TK, dtype=logits_TE.dtype)
            if logits_TE.requires_grad and index_TK.shape[-1] < logits_TE.shape[-1]:
                p_TK = logits_TE.softmax(-1).gather(-1, index_TK)
                weights_TK = weights_TK + (p_TK - p_TK.detach())  # a zero with a gradient
        elif self.weights == "renormalised" and mask_TK is None:
            return logits_TE.gather(-1, index_TK).softmax(-1)
        else:
            weights_TK = logits_TE.softmax(-1).gather(-1, index_TK)
        if mask_TK is not None:
            weights_TK = weights_TK * mask_TK
        if self.weights in ("renormalised", "renorm_detach"):
            total_T1 = weights_TK.sum(-1, keepdim=True)
            total_T1 = total_T1.clamp(min=torch.finfo(total_T1.dtype).tiny)  # no expert at all
            if self.weights == "renorm_detach":
                total_T1 = total_T1.detach()
            weights_TK = weights_TK / total_T1
        elif self.weights == "gain":
            gain_TK = self.gain.to(weights_TK.dtype)[index_TK]
            weights_TK = 1 + gain_TK * weights_TK
            weights_TK = weights_TK if mask_TK is None else weights_TK * mask_TK
        return weights_TK

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        shape = f"num_experts={self.num_experts}, d_model={self.config.d_model}"
        select = self.config.select.to_json()
        return f"{shape}, select={select}, weights={self.weights}, tied={self.tied}"


_METHODS = (Router.forward, Router.scores, Router.choose, Router._weigh)
