"""Extend: one more expert for layers that are mixtures already, without changing what they do."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UnsupportedError, UsageError
from upcycle.layers.config import LayerConfig
from upcycle.layers.tap import place_of
from upcycle.passes.calibrate.sites import run_batch
from upcycle.util.copies import copy_of
from upcycle.util.modules import eval_mode

Like = Literal["visited", "mean"]


@torch.no_grad()
def extend(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    *,
    layers: Sequence[str] | None = None,
    like: Like = "visited",
    bias: float = -math.inf,
) -> nn.Module:
    """Add to each layer of upcycle a copy of the expert that `batches` visit most, and of its row.

    Equal rows would be chosen together wherever the copied expert is the best one, and push out
    the second best. So the logit of the new expert gets a `bias` of minus infinity, with which the
    outputs stay as they are; raise it step by step to 0 in training, with `set_new_bias`.

    Args:
        model: a converted model, loaded or in memory; left alone.
        batches: keyword arguments or tuples that its forward accepts, of the new data.
        layers: paths of the layers to extend; all if None.
        like: ``mean`` adds the mean of the experts, and of their rows, instead.
        bias: of the new expert's logit; old experts without one get 0.

    Returns:
        A copy; every other parameter is bit for bit what it was.

    Raises:
        UsageError: there are no data, or no such layer, or the data do not reach a layer.
        UnsupportedError: a layer is not the best `top_k` of linear scores.

    Source:
        Zhong et al., "MoExtend", 2024, https://arxiv.org/abs/2408.03511, whose copy is not exact
    """
    if not batches:
        raise UsageError("there are no data that show which expert is visited most")
    extended = copy_of(model)
    found = {path: layer for path, layer in _layers(extended) if layers is None or path in layers}
    absent = set(layers or ()) - set(found)
    if absent or not found:
        raise UsageError(f"{', '.join(sorted(absent)) or 'the model'}: no MoE layer of upcycle")
    for path, layer in found.items():
        router = _config(layer).router
        if not router.is_plain or router.tied or router.frozen:
            raise UnsupportedError(
                f"{path}: only a layer that takes the best `top_k` experts of linear scores, "
                "trained and without balance, can be extended; convert with another router"
            )
    loads = _loads(extended, found, batches)
    for path, layer in found.items():
        if not loads[path].any():
            raise UsageError(f"{path}: the data never reach this layer; leave it out of `layers`")
        _add_expert(layer, int(loads[path].argmax()) if like == "visited" else None, bias)
    _tell_config(extended, found)
    return extended


@torch.no_grad()
def set_new_bias(model: nn.Module, bias: float) -> None:
    """Set the logit bias of the new expert of every layer that was extended, in place."""
    for _, layer in _layers(model):
        if _config(layer).router.extended:
            layer.router.bias[-1] = bias


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every MoE layer; in a loaded model its class is that of the model's own file."""
    for path, module in model.named_modules():
        if hasattr(module, "tie_router"):
            yield path, module


def _config(layer: Any) -> LayerConfig:
    """As the class here: the model's own file has another class, or plain data if it is older."""
    config = layer.config
    return LayerConfig.from_json(config if isinstance(config, dict) else config.to_json())


def _loads(
    model: nn.Module, layers: dict[str, Any], batches: Sequence[ExampleInputs]
) -> dict[str, torch.Tensor]:
    """How many tokens visit each expert."""
    loads = {path: torch.zeros(layer.router.num_experts) for path, layer in layers.items()}

    def count(path: str, _: nn.Module, __: object, out: tuple[torch.Tensor, ...]) -> None:
        weights_TK, index_TK = out[1:]
        visited = index_TK[weights_TK != 0].cpu()
        loads[path] += torch.bincount(visited, minlength=len(loads[path]))

    with ExitStack() as hooks, eval_mode(model):
        for path, layer in layers.items():
            hooks.enter_context(layer.router.register_forward_hook(partial(count, path)))
        for batch in batches:
            run_batch(model, batch)
    return loads


def _add_expert(layer: Any, like: int | None, bias: float) -> None:
    """A copy of the expert `like`, or the mean of all."""
    router, experts = layer.router, layer.experts
    if router.bias is None:
        router.bias = nn.Parameter(router.weight.new_zeros(router.num_experts))
    for module in (router, experts):
        for name, tensor in list(module.named_parameters(recurse=False)):
            new = tensor.mean(0, keepdim=True) if like is None else tensor[like : like + 1]
            setattr(module, name, nn.Parameter(torch.cat([tensor, new]), tensor.requires_grad))
    router.bias[-1] = bias
    count = router.num_experts + 1
    router.num_experts = experts.num_experts = count
    config = _config(layer)
    routing = replace(config.router, num_experts=count, bias=True, extended=True)
    config = replace(config, num_experts=count, router=routing)
    if isinstance(layer.config, dict):
        layer.config, router.config = config.to_json(), routing.to_json()
    else:
        layer.config, router.config = config, routing


def _tell_config(model: nn.Module, layers: dict[str, Any]) -> None:
    """A loaded transformers model builds its layers from its configuration."""
    described = getattr(getattr(model, "config", None), "upcycle", None)
    for site in described["sites"] if described else ():
        if place_of(site) in layers:
            site["layer"] = _config(layers[place_of(site)]).to_json()
