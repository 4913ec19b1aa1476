"""The layer that a converted model contains: a router and experts, and what every token gets.

This file and those that it imports are also the text of the files of `targets.remote_code`.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width,
G = arity * I.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.kernels import route_and_visit
from upcycle.layers.config import OTHER_KINDS, LayerConfig
from upcycle.layers.experts import Experts, SharedExpert, are_untouched
from upcycle.layers.router import Router
from upcycle.layers.routers import ROUTER_KINDS

# Multiplications of a router that take no longer than torch's calls.
AT_ONCE = 1 << 20
# Multiplications of a router that are over before a second thread of torch has woken up.
ONE_THREAD = 1 << 23


class MoE(nn.Module):
    """Router and experts; a shared expert, a thin linear map and an output bias for every token.

    ``y = sum_k w_k E_k(x) + Shared(x) + U V x + b``, of which all but the sum may be missing. `b`
    is the output bias of the dense FFN: experts that are parts of one FFN have it in common, and
    added once it is right under every routing rule. Experts that are whole FFNs have one each.
    """

    ffn_path = ""  # of the FFN that it was made of, by which people know the layer

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self._config = config
        self._tied_to: tuple[int, int] | None = None  # the keys that the router was made of
        d_model, d_out, rank = config.d_model, config.d_out, config.low_rank
        ffn: dict[str, Any] = {
            "pointwise": config.pointwise,
            "bias": config.up_bias,
            "dropout": config.hidden_dropout,
        }
        kind = config.router.kind
        self.router: Router = (ROUTER_KINDS.get(kind) or OTHER_KINDS[kind])(config.router)
        sizes = (config.num_experts, d_model, config.width, d_out)
        self.experts = Experts(*sizes, down_bias=config.expert_bias, **ffn)
        self.router_size = sum(tensor.numel() for tensor in self.router.state_dict().values())
        self.router.attach(self.experts)
        self.shared_expert = (
            SharedExpert(d_model, config.shared, d_out, **ffn) if config.shared else None
        )
        self.low_rank = (
            nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_out, bias=False))
            if rank
            else None
        )
        self.output_bias = nn.Parameter(torch.zeros(d_out)) if config.output_bias else None
        self.output_dropout = config.output_dropout
        self.axis = config.axis
        self.is_tied = config.router.tied
        if self.is_tied:
            self.register_state_dict_pre_hook(_refreshed)  # type: ignore[no-untyped-call]

    @property
    def config(self) -> LayerConfig:
        """What the layer is, with what its router is now."""
        router = getattr(self.router, "config", self._config.router)  # another may be in its place
        return replace(self._config, router=router)

    @config.setter
    def config(self, config: LayerConfig) -> None:
        self._config, self.router.config = config, config.router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [..., D] -> [..., O]; with ``axis: 1`` (convolutions) [B, D, ...] likewise."""
        if self.is_tied:
            if self.training:
                self.tie_router()
            else:
                self.refresh_router()
        if self.axis != -1:
            x = x.movedim(self.axis, -1)
        y = self.tokens(x.reshape(-1, x.shape[-1]))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if self.axis != -1:
            y = y.movedim(-1, self.axis)
        return F.dropout(y, self.output_dropout, True) if self.training else y

    def tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The layer on a list of tokens, [T, D] -> [T, O], without dropout."""
        y_TO = self._at_once(x_TD)
        if y_TO is None:
            _, weights_TK, index_TK = self._route(x_TD)
            y_TO = self.experts(x_TD, index_TK, weights_TK)
        if self.shared_expert is not None:
            y_TO = y_TO + self.shared_expert(x_TD)
        if self.low_rank is not None:
            y_TO = y_TO + self.low_rank(x_TD)
        return y_TO if self.output_bias is None else y_TO + self.output_bias

    def _at_once(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """Router and experts in one call for few tokens, where the calls of torch take longer than
        they do; None where only torch can compute it, or a hook watches."""
        if torch.compiler.is_compiling() or not 0 < x_TD.shape[0] * self.router_size < AT_ONCE:
            return None
        parts = self._modules
        experts: Any = parts["experts"]
        router = parts["router"]
        watched: bool = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        if watched or not are_untouched(experts):
            return None
        if experts.config._experts_implementation != "upcycle" or torch.is_autocast_enabled("cpu"):
            return None
        linear = router.as_linear() if isinstance(router, Router) else None
        return None if linear is None else route_and_visit(experts, x_TD, linear)

    def _route(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        is_eager = not torch.compiler.is_compiling() and x_TD.is_cpu
        if not (is_eager and 0 < x_TD.shape[0] * self.router_size < ONE_THREAD):
            return self.router(x_TD)  # type: ignore[no-any-return]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.router(x_TD)  # type: ignore[no-any-return]
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def tie_router(self) -> None:
        """Set each router row to the mean key of its expert, not counting zero padding."""
        up_EGD = self.experts.up_EGD
        if hasattr(up_EGD, "full_tensor"):  # this process holds some of the experts only
            up_EGD = up_EGD.full_tensor()
        key_EID = up_EGD[:, : self.experts.intermediate_dim].to(self.router.weight.dtype)
        count_E1 = (key_EID != 0).any(-1).sum(-1, keepdim=True).clamp(min=1)
        # Not seen by autograd: the same layer may run twice before the backward pass.
        self.router.weight.data.copy_(key_EID.sum(1) / count_E1)
        self._tied_to = (0, 0) if torch.compiler.is_compiling() else self._keys()

    def refresh_router(self) -> None:
        """`tie_router` again where the experts have been moved since."""
        if torch.compiler.is_compiling() or self._tied_to is None:
            return
        if self._tied_to != self._keys():
            self.tie_router()

    def train(self, mode: bool = True) -> "MoE":
        """As that of modules; in evaluation the rows of a tied router are those of the experts."""
        if not mode:
            self.refresh_router()
        return super().train(mode)

    def _keys(self) -> tuple[int, int]:
        """Differs for other keys, and after each change of them."""
        up_EGD = self.experts.up_EGD
        return id(up_EGD), 0 if up_EGD.is_inference() else up_EGD._version


def _refreshed(layer: MoE, *_: object) -> None:
    layer.refresh_router()


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Within it every MoE layer of `model` runs all its experts with weight one (K = N).

    A split is then exactly the dense FFN, whatever its router says.
    """
    routers = [m.router for m in model.modules() if isinstance(m, MoE)]
    before = {router: router.all_experts for router in routers}
    try:
        for router in routers:
            router.all_experts = True
        yield
    finally:
        for router, was in before.items():
            router.all_experts = was


def rebalance(model: nn.Module, rate: float = 1e-3) -> None:
    """`Router.rebalance` for every layer of `model` that balances its load."""
    for layer in model.modules():
        if isinstance(layer, MoE) and layer.config.router.balance:
            layer.router.rebalance(rate)
