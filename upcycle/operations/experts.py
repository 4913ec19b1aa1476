"""Take some experts of a layer, in some order: the experts, and what the router has of each.

Shape suffixes: E experts, D d_model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.errors import UnsupportedError
from upcycle.layers.config import LayerConfig
from upcycle.layers.tap import place_of
from upcycle.routing.contract import RoutedLayer

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts")


def check_order(layer: RoutedLayer) -> None:
    """Refuse routers whose numbers say more than which row is which expert's.

    Raises:
        UnsupportedError: this is one.
    """
    config = _own_config(layer)
    if config is None:
        groups = [getattr(layer.router, name, 1) or 1 for name in ("n_group", "num_expert_group")]
        if max(groups) > 1:
            raise UnsupportedError(
                f"{layer.path}: its router chooses groups of neighbouring experts first, so they "
                "cannot change places"
            )
    elif config.router.kind not in ("linear", "noisy"):
        raise UnsupportedError(
            f"{layer.path}: its router ({config.router.kind}) has no row for each expert to be "
            "moved; only linear routers have"
        )


@torch.no_grad()
def take(layer: RoutedLayer, experts: Sequence[int]) -> None:
    """Leave only these `experts` in `layer`, in this order, in place.

    All of them in another order change no output.

    Raises:
        UnsupportedError: the router cannot follow.
    """
    check_order(layer)
    count, chosen = layer.num_experts, torch.tensor(list(experts))
    for name, stack in list(layer.experts.named_parameters(recurse=False)):
        if stack.shape[0] == count:
            _put(layer.experts, name, stack[chosen.to(stack.device)])
    config = _own_config(layer)
    nulls = 0 if config is None else config.router.nulls
    moved = 0
    for module in layer.router.modules():
        own: dict[str, Tensor] = dict(module.named_buffers(recurse=False))
        own |= dict(module.named_parameters(recurse=False))
        for name, tensor in own.items():
            axis = _axis(tensor, count + nulls, count)
            if axis is None:
                continue
            rows = chosen.to(tensor.device)
            if tensor.shape[axis] == count + nulls and nulls:
                rows = torch.cat([rows, torch.arange(count, count + nulls, device=rows.device)])
            _put(module, name, tensor.index_select(axis, rows))
            moved += 1
    if not moved:
        raise UnsupportedError(f"{layer.path}: its router has no row for each expert")
    _tell(layer, config, len(chosen))


def _axis(tensor: Tensor, *sizes: int) -> int | None:
    """The axis with an entry for each expert: the first one, or the last one of [1, E]."""
    if tensor.dim() and tensor.shape[0] in sizes:
        return 0
    return 1 if tensor.dim() == 2 and tensor.shape[0] == 1 and tensor.shape[1] in sizes else None


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = getattr(module, name)
    tensor = tensor.contiguous()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        setattr(module, name, tensor)


def _own_config(layer: RoutedLayer) -> LayerConfig | None:
    """Of a layer of upcycle; None for others. That of a model's own file is another class."""
    config: Any = getattr(layer.block, "config", None)
    if hasattr(config, "router") and hasattr(config, "to_json"):
        return LayerConfig.from_json(config.to_json())
    return None


def _tell(layer: RoutedLayer, config: LayerConfig | None, count: int) -> None:
    """Write the number of experts wherever the modules of the layer have it."""
    for module in (layer.block, layer.router, layer.experts):
        for name in _COUNTS:
            if isinstance(vars(module).get(name), int):
                setattr(module, name, count)
    if config is not None:
        block: Any = layer.block
        block.config = replace(
            config, num_experts=count, router=replace(config.router, num_experts=count)
        )


def is_own(layer: RoutedLayer) -> bool:
    """Whether the layer has a configuration of its own, so that it may differ from others."""
    return _own_config(layer) is not None


def tell_model(model: nn.Module, layers: Sequence[RoutedLayer]) -> None:
    """Write the numbers of experts into the configuration, from which a loaded model is built.

    Layers that are not of upcycle have as many as the first.
    """
    count = layers[0].num_experts
    for name in _COUNTS:  # from which the balance loss is computed
        if isinstance(vars(model).get(name), int):
            setattr(model, name, count)
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    described = getattr(config, "upcycle", None)
    if described:
        own = {layer.path: _own_config(layer) for layer in layers}
        for site in described["sites"]:
            # Code that an older upcycle wrote does not know the FFN.
            found = own.get(str(site["path"])) or own.get(place_of(site))
            if found is not None:
                site["layer"] = found.to_json()
        return
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in _COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, count)
