"""The MoE layers of a model that is one already, whoever wrote its class.

Experts are found by the experts interface of transformers 5 (fused 3-D weights, and a forward of
tokens, indices and weights), which the layers of upcycle follow, too.

Shape suffixes: E experts, D d_model, O d_out, I expert width, G = arity * I.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.errors import UnsupportedError
from upcycle.ir.ffn import FFN
from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE
from upcycle.passes.locate.locate import locate_in
from upcycle.util.modules import set_within

_FACTS = ("num_experts", "is_transposed", "has_gate", "has_bias", "_apply_gate")


@dataclass(frozen=True)
class MoELayer:
    """An MoE layer of a model.

    Attributes:
        path: of the module that has router and experts.
        name: the path that people read: of the FFN that it was made of, as every table has it; of
            a layer that upcycle did not make, `path`.
        block: that module.
        experts: the module of the experts in it.
        num_experts, width, d_model: E, I, D.
        top_k: experts of a token, at most; None if the block does not say.
        shared: neurons of what every token visits, a shared expert.
        router: the class of the router.
        is_own: it is a layer of upcycle, with its configuration.
    """

    path: str
    name: str
    block: nn.Module
    experts: nn.Module
    num_experts: int
    width: int
    d_model: int
    top_k: int | None
    shared: int
    router: str
    is_own: bool


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model`, which may be on the meta device, in their order."""
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        if not (isinstance(module, Experts) or has_interface(module)):
            continue
        parent = path.rpartition(".")[0]
        block = modules[parent]
        found.append(
            _own(parent, block) if isinstance(block, MoE) else _native(parent, block, module)
        )
    return found


def has_interface(module: nn.Module) -> bool:
    """Whether these are experts as transformers' interface describes them."""
    if not all(hasattr(module, name) for name in _FACTS):
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)
    return len(arguments) == 4 and arguments[2] in ("top_k_index", "router_indices")


def _own(path: str, layer: MoE) -> MoELayer:
    config, router = layer.config, layer.config.router
    return MoELayer(
        path=path,
        name=layer.ffn_path or path,
        block=layer,
        experts=layer.experts,
        num_experts=config.num_experts,
        width=config.width,
        d_model=config.d_model,
        top_k=min(router.select.k, config.num_experts),
        shared=config.shared,
        router=f"{router.kind}, {router.select.rule}, {router.weights}",
        is_own=True,
    )


def _native(path: str, block: nn.Module, experts: Any) -> MoELayer:
    down = experts.down_proj
    count, first, last = down.shape
    d_model, width = (last, first) if experts.is_transposed else (first, last)
    others = dict(block.named_children())
    router = next((m for name, m in others.items() if name in ("gate", "router")), None)
    named = [getattr(holder, name, None) for holder in (router, block) for name in _TOP_K]
    beside = [m for name, m in others.items() if "shared" in name and "gate" not in name]
    weights = sum(p.numel() for m in beside for p in m.parameters() if p.dim() > 1)
    matrices = 3 if experts.has_gate else 2
    return MoELayer(
        path=path,
        name=getattr(block, "ffn_path", "") or path,  # of upcycle, in a file of its own
        block=block,
        experts=experts,
        num_experts=count,
        width=width,
        d_model=d_model,
        top_k=next((k for k in named if isinstance(k, int)), None),
        shared=weights // (matrices * d_model),
        router=type(router or block).__name__,
        is_own=False,
    )


_TOP_K = ("top_k", "num_experts_per_tok", "k")


@contextmanager
def with_own_experts(model: nn.Module) -> Iterator[None]:
    """Within it the experts of `model` are `Experts`, which compute the same of the same weights.

    Raises:
        UnsupportedError: what the experts of a layer compute is no FFN.
    """
    with ExitStack() as undo:
        for layer in moe_layers(model):
            if not isinstance(layer.experts, Experts):
                (name,) = (n for n, m in layer.block.named_children() if m is layer.experts)
                set_within(undo, layer.block, name, as_experts(layer.experts, layer.name))
        yield


def own_experts(model: nn.Module) -> dict[str, Experts]:
    """The experts of the layers of `model` by path; all of them are `Experts`."""
    found = {layer.path: layer.experts for layer in moe_layers(model)}
    return {path: experts for path, experts in found.items() if isinstance(experts, Experts)}


def as_experts(module: Any, path: str) -> Experts:
    """Experts of the interface as `Experts` that share their memory, unless rows have to be moved.

    Raises:
        UnsupportedError: what they compute is no FFN of its own.
    """
    up_EGD, down_EOI, up_bias_EG, down_bias_EO = _tensors(module)
    ffn = _found(module, path)
    made = Experts(
        *(module.num_experts, up_EGD.shape[2], down_EOI.shape[2], down_EOI.shape[1]),
        pointwise=ffn.pointwise,
        bias=up_bias_EG is not None,
        down_bias=down_bias_EO is not None,
    )
    rows = [row for projection in ffn.expansions for row in range(*projection.rows)]
    if rows != [*range(len(rows))]:
        up_EGD = up_EGD[:, rows]
        up_bias_EG = None if up_bias_EG is None else up_bias_EG[:, rows]
    named: dict[str, torch.Tensor | None] = {made.up_name: up_EGD, "down_proj": down_EOI}
    named |= {f"{made.up_name}_bias": up_bias_EG, "down_proj_bias": down_bias_EO}
    for name, tensor in named.items():
        if tensor is not None:
            made._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return made.train(module.training)


def _tensors(
    module: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Expansions [E, G, D] and contraction [E, O, I] of the experts, and their biases."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.mT, down.mT
    if not module.has_bias:
        return up, down, None, None
    return up, down, getattr(module, f"{name}_bias"), module.down_proj_bias


class _OneExpert(nn.Module):
    """The first of the experts by itself, so that it is found by what it computes."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        up_EGD, down_EOI, up_bias_EG, down_bias_EO = _tensors(module)
        self.module = [module]  # no child: its own forward is not asked for
        self.up = _linear(up_EGD, up_bias_EG)
        self.down = _linear(down_EOI, down_bias_EO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        module, hidden = self.module[0], self.up(x)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        y: torch.Tensor = self.down(hidden)
        return y


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """The map of the first expert."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[2], weight.shape[1], bias=bias is not None)
    made.weight = nn.Parameter(weight[0].detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias[0].detach(), requires_grad=False)
    return made


def _found(module: Any, path: str) -> FFN:
    one = _OneExpert(module).eval()
    located = locate_in(one, (torch.zeros(2, one.up.in_features, dtype=one.up.weight.dtype),))
    if len(located.ffns) != 1 or getattr(module, "has_post_expert_norm", False):
        reasons = "; ".join(miss.reason for miss in located.misses)
        raise UnsupportedError(
            f"{path}: what its experts ({type(module).__name__}) compute is no FFN"
            + (f": {reasons}" if reasons else "")
        )
    return located.ffns[0]
