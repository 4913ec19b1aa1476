"""The experts of an MoE layer.

They follow the experts interface of transformers 5 (fused 3-D weights and
``forward(hidden_states, top_k_index, top_k_weights)``), so its kernels, expert parallelism, PEFT
and the backends of other runtimes can use them as they are.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width,
G = arity * I.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upcycle.kernels import fits_grouped_mm, run_experts, visit_by_all
from upcycle.kernels.torch_operation import run_as_one_node
from upcycle.pointwise import Pointwise


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
    """E experts of I neurons each, as 3-D tensors.

    Gated: `gate_up_proj` [E, 2I, D] (gate rows first); plain: `up_proj` [E, I, D]; then
    `down_proj` [E, O, I]; optional `*_bias`, of the contraction where each expert is a whole FFN
    (`down_bias`). `program` is the activation as a line of JSON.
    Which kernel runs is ``config._experts_implementation``: ``upcycle``, which is `run_experts` on
    the CPU and ``grouped_mm`` elsewhere, another name that transformers knows, ``eager``, or one
    for graphs: ``portable``, which any compiler of torch can take, and ``one_node``.
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
        down_bias: bool = False,
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
        self.config: Any = SimpleNamespace(_experts_implementation="upcycle")
        self.program = json.dumps(pointwise.to_json())
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        rows = pointwise.arity * width
        self.register_parameter(self.up_name, nn.Parameter(torch.zeros(num_experts, rows, d_model)))
        if bias:
            up_bias = nn.Parameter(torch.zeros(num_experts, rows))
            self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_proj = nn.Parameter(torch.zeros(num_experts, d_out, width))
        if down_bias:  # under the property of that name
            self._parameters["down_proj_bias"] = nn.Parameter(torch.zeros(num_experts, d_out))

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
    def down_bias_EO(self) -> torch.Tensor | None:
        """The biases of the contractions, [E, O], or None."""
        return self._parameters.get("down_proj_bias")

    @property
    def down_proj_bias(self) -> torch.Tensor:
        """As `down_bias_EO`, or zeros: the interface wants it beside an up bias, also where the
        layer adds the output bias."""
        own = self.down_bias_EO
        return self.down_proj.new_zeros(self.down_proj.shape[:2]) if own is None else own

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.act_fn(*gate_up.chunk(self.act_fn.pointwise.arity, dim=-1))
        return hidden

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [T, D], index [T, K] int64, weights [T, K] -> [T, O], in the tokens' dtype."""
        name = self.config._experts_implementation
        if name == "portable":
            return self.sorted_forward(hidden_states, top_k_index, top_k_weights)
        if name == "one_node":
            return run_as_one_node(self, hidden_states, top_k_index, top_k_weights)
        if name == "upcycle":
            if hidden_states.device.type != "cpu":
                name = "grouped_mm"
            elif self._must_be_unrolled():
                return self.masked_forward(hidden_states, top_k_index, top_k_weights)
            else:
                return run_experts(self, hidden_states, top_k_index, top_k_weights)
        # The functions of transformers take the width of the output from the input, and have both
        # biases or none.
        is_square = self.down_proj.shape[1] == self.hidden_dim
        fits = name != "grouped_mm" or fits_grouped_mm(self.up_EGD, self.down_proj)
        if not (is_square and fits and (self.has_bias or self.down_bias_EO is None)):
            name = "eager"
        if name != "eager":
            kernel = ALL_EXPERTS_FUNCTIONS.get_interface(name, type(self).eager_forward)
        elif torch.compiler.is_compiling():  # shapes may not depend on the routing
            kernel = type(self).masked_forward
        else:
            kernel = type(self).eager_forward
        out: torch.Tensor = kernel(self, hidden_states, top_k_index, top_k_weights)
        return out

    def _must_be_unrolled(self) -> bool:
        """Whether a compiler must see ordinary operations instead of ``upcycle::moe``."""
        has_dropout = self.training and self.act_fn.dropout > 0
        return torch.compiler.is_compiling() and (torch.onnx.is_in_onnx_export() or has_dropout)

    def expert(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """What one expert adds for tokens [T, D], not weighted; [T, O]."""
        bias = None if self.up_bias_EG is None else self.up_bias_EG[expert]
        hidden = self._apply_gate(F.linear(x_TD, self.up_EGD[expert], bias))
        own = self.down_bias_EO
        return F.linear(hidden, self.down_proj[expert], None if own is None else own[expert])

    def eager_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """One expert after the other: the reference that the kernels are held against."""
        out_TO = weights_TK.new_zeros(len(x_TD), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            token, slot = torch.where((index_TK == expert) & (weights_TK != 0))
            y = self.expert(expert, x_TD[token]) * weights_TK[token, slot, None]
            out_TO = out_TO.index_add(0, token, y.to(out_TO.dtype))
        return out_TO.to(x_TD.dtype)

    def masked_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on every token, weighted: shapes that do not depend on the routing."""
        out_TO = weights_TK.new_zeros(len(x_TD), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            weight_T1 = (weights_TK * (index_TK == expert)).sum(-1, keepdim=True)
            out_TO = out_TO + self.expert(expert, x_TD) * weight_T1
        return out_TO.to(x_TD.dtype)

    def sorted_forward(
        self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Each expert on its own tokens, in operations of ATen alone: pairs of a token and an
        expert are sorted by expert, and how many each has is read as a number.

        Pairs of weight zero are visited, and count for nothing.
        """
        expert_S, top_k = index_TK.reshape(-1), index_TK.shape[1]
        order_S = expert_S.argsort()
        token_S = order_S // top_k
        experts_E = torch.arange(self.num_experts, device=expert_S.device)
        counts: list[int] = (expert_S[:, None] == experts_E).sum(0).tolist()
        parts = torch.split(x_TD[token_S], counts)
        y_SO = torch.cat([self.expert(e, part_tD) for e, part_tD in enumerate(parts)])
        y_SO = y_SO * weights_TK.reshape(-1)[order_S, None]
        out_TO = weights_TK.new_zeros(x_TD.shape[0], self.down_proj.shape[1])
        return out_TO.index_add(0, token_S, y_SO.to(out_TO.dtype)).to(x_TD.dtype)


_FORWARD = Experts.forward


def are_untouched(experts: nn.Module) -> bool:
    """Whether these are `Experts` with the `forward` above, and without a hook."""
    return is_untouched(experts, Experts) and Experts.forward is _FORWARD


class SharedExpert(nn.Module):
    """The neurons that every token visits, as one FFN without an output bias, [T, D] -> [T, O]."""

    def __init__(
        self,
        d_model: int,
        width: int,
        d_out: int,
        *,
        pointwise: Pointwise,
        bias: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.act_fn = Activation(pointwise, dropout)
        self.has_gate = pointwise.arity > 1
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        rows = pointwise.arity * width
        setattr(self, self.up_name, nn.Linear(d_model, rows, bias=bias))
        self.down_proj = nn.Linear(width, d_out, bias=False)

    @property
    def up(self) -> nn.Linear:
        """The fused expansions, [arity * S, D]."""
        linear: nn.Linear = getattr(self, self.up_name)
        return linear

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The sum over the shared neurons."""
        if is_untouched(self.up, nn.Linear) and is_untouched(self.down_proj, nn.Linear):
            found = visit_by_all(self, x_TD)
            if found is not None:
                return found
        z_TG = self.up(x_TD)
        hidden_TI = self.act_fn(*z_TG.chunk(self.act_fn.pointwise.arity, dim=-1))
        return self.down_proj(hidden_TI)  # type: ignore[no-any-return]


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether no adapter and no hook was put there."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooks
