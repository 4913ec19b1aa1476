"""The layer that a converted model contains: a router and experts.

The experts follow the experts interface of transformers 5 (a child `experts` with fused 3-D
weights and ``forward(hidden_states, top_k_index, top_k_weights)``), so its kernels, expert
parallelism, PEFT and the backends of other runtimes can use them as they are.

This file and `pointwise.py` and `tap.py` are also the source text of the self-contained modeling
files that `targets.remote_code` writes, so they import nothing else of upcycle.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width,
G = arity * I.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upcycle.pointwise import Pointwise

WeightRule = Literal["renormalised", "softmax", "one", "renorm_detach"]


class Router(nn.Module):
    """Chooses `top_k` experts for each token.

    The scores are computed in float32 (float64 for float64 tokens). Weight rules, with p the
    softmax over all experts and S the chosen set:

    - ``renormalised``: p / sum of p over S. Sums to one.
    - ``softmax``: p. Sums to less than one.
    - ``one``: 1 for each chosen expert.
    - ``renorm_detach``: as renormalised, but no gradient through the sum, so that the router gets
      a gradient from the task even while all experts are equal.

    `scale` multiplies the weights. A `tied` router has no parameter: its rows are the mean expert
    keys (the rows that the activation reads), refreshed on every training step
    (Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908).
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        *,
        top_k: int,
        weights: WeightRule,
        bias: bool = False,
        tied: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.weights: WeightRule = weights
        self.scale = scale
        self.tied = tied
        weight = torch.zeros(num_experts, d_model)
        if tied:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits [T, E], weights [T, K] and index [T, K] of the chosen experts."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype), bias)
        top_TK, index_TK = logits_TE.topk(self.top_k, dim=-1)
        if self.weights == "one":
            weights_TK = torch.ones_like(top_TK)
        elif self.weights == "renormalised":
            weights_TK = top_TK.softmax(-1)
        else:
            weights_TK = logits_TE.softmax(-1).gather(-1, index_TK)
            if self.weights == "renorm_detach":
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).detach()
        return logits_TE, weights_TK * self.scale, index_TK

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        shape = f"num_experts={self.weight.shape[0]}, d_model={self.weight.shape[1]}"
        return f"{shape}, top_k={self.top_k}, weights={self.weights}, tied={self.tied}"


class Activation(nn.Module):
    """`Pointwise` as a module, with the dropout that the dense FFN had on its hidden layer."""

    def __init__(self, pointwise: Pointwise, dropout: float) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.dropout = dropout

    def forward(self, *z: torch.Tensor) -> torch.Tensor:
        """As `Pointwise.__call__`, then dropout."""
        return F.dropout(self.pointwise(*z), self.dropout, self.training)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return self.pointwise.name


class Experts(nn.Module):
    """E experts of I neurons each, stored as 3-D tensors.

    Gated: `gate_up_proj` [E, 2I, D] (gate rows first); plain: `up_proj` [E, I, D]; then
    `down_proj` [E, O, I]; optional `*_bias`. Which kernel runs is
    ``config._experts_implementation``, a name that transformers knows, or ``eager``.
    """

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        width: int,
        d_out: int,
        *,
        pointwise: Pointwise,
        bias: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = d_model
        self.intermediate_dim = width
        self.has_gate = pointwise.arity > 1
        self.has_bias = bias
        self._is_expert_parallel = False
        self.act_fn = Activation(pointwise, dropout)
        # The kernels of transformers take the output width from the input: d_out = d_model only.
        self.config = SimpleNamespace(
            _experts_implementation="grouped_mm" if d_out == d_model else "eager"
        )
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        rows = pointwise.arity * width
        self.register_parameter(self.up_name, nn.Parameter(torch.zeros(num_experts, rows, d_model)))
        if bias:
            up_bias = nn.Parameter(torch.zeros(num_experts, rows))
            self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_proj = nn.Parameter(torch.zeros(num_experts, d_out, width))

    @property
    def up_EGD(self) -> torch.Tensor:
        """The fused expansions, [E, arity * I, D]."""
        weight: torch.Tensor = getattr(self, self.up_name)
        return weight

    @property
    def up_bias_EG(self) -> torch.Tensor | None:
        """The biases of the expansions, [E, arity * I], or None."""
        bias: torch.Tensor | None = getattr(self, f"{self.up_name}_bias", None)
        return bias

    @property
    def down_proj_bias(self) -> torch.Tensor:
        """Zeros [E, O]: the interface wants it beside an up bias; the layer adds the real one."""
        return self.down_proj.new_zeros(self.down_proj.shape[:2])

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.act_fn(*gate_up.chunk(self.act_fn.pointwise.arity, dim=-1))
        return hidden

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [T, D], index [T, K] int64, weights [T, K] -> [T, O], in the tokens' dtype."""
        name = self.config._experts_implementation
        if name == "grouped_mm" and not self._fits_grouped_mm():
            name = "eager"
        if name != "eager":
            kernel = ALL_EXPERTS_FUNCTIONS.get_interface(name, type(self).eager_forward)
        elif torch.compiler.is_compiling():  # shapes may not depend on the routing
            kernel = type(self).masked_forward
        else:
            kernel = type(self).eager_forward
        out: torch.Tensor = kernel(self, hidden_states, top_k_index, top_k_weights)
        return out

    def _fits_grouped_mm(self) -> bool:
        """torch's grouped_mm: no float64, and rows whose length in bytes is a multiple of 16."""
        size = self.down_proj.element_size()
        widths = (self.hidden_dim, self.intermediate_dim, self.up_EGD.shape[1])
        return size <= 4 and all(width * size % 16 == 0 for width in widths)

    def _expert(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        up_bias_EG = self.up_bias_EG
        bias = None if up_bias_EG is None else up_bias_EG[expert]
        hidden = self._apply_gate(F.linear(x_TD, self.up_EGD[expert], bias))
        return F.linear(hidden, self.down_proj[expert])

    def eager_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """One expert after the other: the reference that the kernels are held against."""
        out_TO = weights_TK.new_zeros(len(x_TD), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            token, slot = torch.where(index_TK == expert)
            y = self._expert(expert, x_TD[token]) * weights_TK[token, slot, None]
            out_TO = out_TO.index_add(0, token, y.to(out_TO.dtype))
        return out_TO.to(x_TD.dtype)

    def masked_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on every token, weighted: shapes that do not depend on the routing."""
        out_TO = weights_TK.new_zeros(len(x_TD), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            weight_T1 = (weights_TK * (index_TK == expert)).sum(-1, keepdim=True)
            out_TO = out_TO + self._expert(expert, x_TD) * weight_T1
        return out_TO.to(x_TD.dtype)


class MoE(nn.Module):
    """Router, experts, and the output bias of the dense FFN, which is added once.

    `config` is plain data, as `layer_config` makes it, so that a checkpoint can carry it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        pointwise = Pointwise.from_json(config["pointwise"])
        num_experts, d_model, d_out = config["num_experts"], config["d_model"], config["d_out"]
        self.router = Router(
            num_experts,
            d_model,
            top_k=config["top_k"],
            weights=config["weights"],
            bias=config["router_bias"],
            tied=config["tied"],
            scale=config["scale"],
        )
        self.experts = Experts(
            num_experts,
            d_model,
            config["width"],
            d_out,
            pointwise=pointwise,
            bias=config["up_bias"],
            dropout=config["hidden_dropout"],
        )
        self.output_bias = nn.Parameter(torch.zeros(d_out)) if config["output_bias"] else None
        self.output_dropout = config["output_dropout"]
        self.axis = config.get("axis", -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [..., D] -> [..., O]; with ``axis: 1`` (convolutions) [B, D, ...] likewise."""
        if self.router.tied and self.training:
            self.tie_router()
        x = x.movedim(self.axis, -1)
        y = self.tokens(x.reshape(-1, x.shape[-1]))
        y = y.reshape(*x.shape[:-1], y.shape[-1]).movedim(-1, self.axis)
        return F.dropout(y, self.output_dropout, self.training)

    def tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The layer on a list of tokens, [T, D] -> [T, O], without dropout."""
        _, weights_TK, index_TK = self.router(x_TD)
        y_TO: torch.Tensor = self.experts(x_TD, index_TK, weights_TK)
        return y_TO if self.output_bias is None else y_TO + self.output_bias

    @torch.no_grad()
    def tie_router(self) -> None:
        """Set each router row to the mean key of its expert, not counting zero padding."""
        key_EID = self.experts.up_EGD[:, : self.experts.intermediate_dim].to(
            self.router.weight.dtype
        )
        count_E1 = (key_EID != 0).any(-1).sum(-1, keepdim=True).clamp(min=1)
        # Not seen by autograd: the same layer may run twice before the backward pass.
        self.router.weight.data.copy_(key_EID.sum(1) / count_E1)


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Within it every MoE layer of `model` runs all its experts with weight one (K = N).

    A split is then exactly the dense FFN, whatever its router says: the check that every split
    method is run with.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    saved = [(r, r.top_k, r.weights, r.scale) for r in routers]
    try:
        for router in routers:
            router.top_k, router.weights, router.scale = router.weight.shape[0], "one", 1.0
        yield
    finally:
        for router, top_k, weights, scale in saved:
            router.top_k, router.weights, router.scale = top_k, weights, scale
