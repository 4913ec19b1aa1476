"""The routers of a model, whoever wrote its class.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.errors import UnsupportedError, UsageError
from upcycle.layers.moe import MoE
from upcycle.models.moe_layers import moe_layers

Routing = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, K], index [T, K]


@dataclass(frozen=True)
class RoutedLayer:
    """An MoE layer of a model, and the router in it.

    Attributes:
        number: its place among the MoE layers of the model, from 0.
        path: of the FFN that it was made of, as every table has it; of a layer that upcycle did not
            make, of the module that has router and experts.
        num_experts: E.
        top_k: experts of a token, at most; None if the model does not say.
    """

    number: int
    path: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int | None


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The MoE layers of `model` with their routers, in order.

    Raises:
        UsageError: it has none.
        UnsupportedError: one of them has no router of its own.
    """
    found = []
    for number, layer in enumerate(moe_layers(model)):
        children = dict(layer.block.named_children())
        router = next((children[name] for name in ("router", "gate") if name in children), None)
        if router is None:
            raise UnsupportedError(
                f"{layer.name}: {type(layer.block).__name__} has no module that routes, so nothing "
                "can be seen of its routing, and nothing changed"
            )
        parts = (layer.block, router, layer.experts)
        found.append(RoutedLayer(number, layer.name, *parts, layer.num_experts, layer.top_k))
    if not found:
        raise UsageError("the model has no MoE layer; give one that was converted, or a native one")
    return found


def as_routing(layer: RoutedLayer, output: Any) -> Routing:
    """What the router of `layer` returned.

    Raises:
        UnsupportedError: it is not logits, weights and index.
    """
    if isinstance(output, tuple) and len(output) == 3:
        logits, weights, index = output
        tensors = all(isinstance(part, Tensor) for part in output)
        if tensors and weights.shape == index.shape and not index.is_floating_point():
            return logits, weights, index
    raise UnsupportedError(
        f"{layer.path}: its router ({type(layer.router).__name__}) does not return logits, weights "
        "and index, as those of upcycle and of transformers 5 do"
    )


def routed_with(layer: RoutedLayer, args: tuple[Any, ...], k: int) -> Routing:
    """What the router returns for `args` with `k` experts a token, by its own rules.

    A shallow copy of it runs, so that other threads see no change.

    Raises:
        UnsupportedError: its rules have no k.
    """
    other: Any = copy.copy(layer.router)
    if not hasattr(other, "top_k"):
        raise UnsupportedError(f"{layer.path}: its router has no `top_k` that could be changed")
    other.top_k = k
    if isinstance(layer.block, MoE):
        other.all_experts = False
    routing = as_routing(layer, other.forward(*args))
    if routing[2].shape[-1] != k:
        raise UnsupportedError(
            f"{layer.path}: its rule chooses {routing[2].shape[-1]} experts for a token whatever k "
            "is; override another layer, or convert with `router.top_k`"
        )
    return routing


def sums_to_the_same(layer: RoutedLayer) -> bool:
    """Whether the weights of a token have the same sum for every choice of experts, by rule."""
    if isinstance(layer.block, MoE):
        return layer.block.router.weights in ("renormalised", "renorm_detach")
    return bool(getattr(layer.router, "norm_topk_prob", True))


def rescaled(weights_TK: Tensor, total_T1: Tensor) -> Tensor:
    """The weights with this sum; those of a token without any stay zero."""
    sum_T1 = weights_TK.sum(-1, keepdim=True)
    tiny = torch.finfo(weights_TK.dtype).tiny
    return weights_TK * torch.where(sum_T1 == 0, 1, total_T1 / sum_T1.clamp(min=tiny))
