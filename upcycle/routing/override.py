"""Change the routing of a model for the time of a block."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

import torch
from torch import nn

from upcycle.errors import UsageError
from upcycle.layers.moe import MoE
from upcycle.routing.change import Change, Remap
from upcycle.routing.contract import RoutedLayer, routed_layers
from upcycle.routing.views import View, attach, opened

Number = int | Mapping[int | str, int]  # for all layers, or by layer
Expert = tuple[int | str, int]  # a layer, by number or path, and an expert of it
Value = TypeVar("Value")


@dataclass(frozen=True)
class Override:
    """What holds within the block.

    Attributes:
        changes: by number of the layer.
        path: ``same``: nothing is changed, and layers run as they do without the block, bit for
            bit; ``routed``: routers of upcycle leave their fused call, so that even experts that
            no token visits may move the output by rounding.
    """

    changes: Mapping[int, Change]
    path: Literal["same", "routed"]


@contextmanager
def override(
    model: nn.Module,
    *,
    k: Number | None = None,
    ranks: Sequence[int] = (),
    suppress: Collection[Expert] = (),
    force: Collection[Expert] = (),
    scale: Mapping[Expert, float] | None = None,
    shuffle: int | None = None,
    remap: Remap | None = None,
) -> Iterator[Override]:
    """Within it `model` routes otherwise, in prefill and in decoding alike; afterwards as before.

    Experts are chosen by the router's own rules with another `k`, or of these by `ranks`; then
    forced, suppressed and scaled, and last put in other places. Where the weights of a token have
    one sum by rule, they keep it, but for `scale`. Blocks may be nested: inner ones come after
    outer ones, and of several `k` or `ranks` the innermost counts. A block holds in its own thread,
    and in no other.

    Args:
        model: with layers of upcycle, or a native mixture of experts; not compiled.
        k: experts of a token; for some layers as ``{layer: k}``.
        ranks: the experts that a token visits: 1 is the best one by the router's scores, 2 the
            second best, ... (rank-k routing of Shi et al., "SCMoE", 2024,
            https://arxiv.org/abs/2405.14507).
        suppress: experts that get weight zero after the choice, and no other comes for them
            (Dahlke et al., "MoTE", 2025, https://arxiv.org/abs/2502.11096). A token that visits no
            other expert gets the shared expert alone, if there is one.
        force: experts that every token visits, with the largest weight of the token, instead of
            the expert with its smallest one.
        scale: factors of the weight of experts, without a new sum.
        shuffle: seed of an order in which the experts of each layer change places: a model whose
            experts differ gets worse by it (Jing et al., "EvoMoE", 2025,
            https://arxiv.org/abs/2505.23830).
        remap: gets the number of a layer and its index [T, K], and returns another.

    Raises:
        UsageError: there is no such layer, expert, rank or k.
        UnsupportedError: the model is compiled, or a router cannot do it.
    """
    view = _view(
        model,
        k=k,
        ranks=ranks,
        suppress=suppress,
        force=force,
        scale=scale or {},
        shuffle=shuffle,
        remap=remap,
    )
    has_own = any(isinstance(view.layers[number].block, MoE) for number in view.changes)
    with opened(model, view):
        yield Override(view.changes, "routed" if has_own else "same")


def steer(
    model: nn.Module, *, suppress: Collection[Expert] = (), force: Collection[Expert] = ()
) -> None:
    """Suppress and force experts as `override` does, for as long as `model` lives, in every thread.

    Raises:
        UsageError, UnsupportedError: as `override`.
    """
    view = _view(model, suppress=suppress, force=force)
    attach(model, replace(view, lasts=True))


def _view(
    model: nn.Module,
    *,
    k: Number | None = None,
    ranks: Sequence[int] = (),
    suppress: Collection[Expert] = (),
    force: Collection[Expert] = (),
    scale: Mapping[Expert, float] = MappingProxyType({}),
    shuffle: int | None = None,
    remap: Remap | None = None,
) -> View:
    layers = routed_layers(model)
    numbers: dict[int | str, RoutedLayer] = {layer.path: layer for layer in layers}
    numbers |= {layer.number: layer for layer in layers}
    ks = dict.fromkeys(range(len(layers)), k) if isinstance(k, int) else _by_layer(k or {}, numbers)
    forced, gone = _experts(force, numbers, "force"), _experts(suppress, numbers, "suppress")
    factors: dict[int, dict[int, float]] = {}
    for (key, expert), factor in scale.items():
        ((number, experts),) = _experts([(key, expert)], numbers, "scale").items()
        factors.setdefault(number, {})[experts[0]] = float(factor)
    changes = {}
    for layer in layers:
        own = ks.get(layer.number)
        _check(layer, own, ranks)
        change = Change(
            own,
            tuple(ranks),
            forced.get(layer.number, ()),
            gone.get(layer.number, ()),
            factors.get(layer.number, {}),
            None if shuffle is None else _order(layer, shuffle),
            remap,
        )
        if change != Change():
            changes[layer.number] = change
    return View(tuple(layers), changes)


def _layer(key: int | str, layers: Mapping[int | str, RoutedLayer]) -> RoutedLayer:
    if key not in layers:
        count = len({layer.number for layer in layers.values()})
        raise UsageError(
            f"layer {key}: the model has {count} MoE layers, numbered from 0; give such a number, "
            "or the path of one"
        )
    return layers[key]


def _by_layer(
    given: Mapping[int | str, Value], layers: Mapping[int | str, RoutedLayer]
) -> dict[int, Value]:
    return {_layer(key, layers).number: value for key, value in given.items()}


def _experts(
    given: Collection[Expert], layers: Mapping[int | str, RoutedLayer], name: str
) -> dict[int, tuple[int, ...]]:
    """The experts of each layer."""
    found: dict[int, tuple[int, ...]] = {}
    for key, expert in given:
        layer = _layer(key, layers)
        if not 0 <= expert < layer.num_experts:
            raise UsageError(
                f"{name}: {layer.path} has no expert {expert}; choose 0 to {layer.num_experts - 1}"
            )
        found[layer.number] = (*found.get(layer.number, ()), expert)
    return found


def _check(layer: RoutedLayer, k: int | None, ranks: Sequence[int]) -> None:
    if k is not None and ranks:
        raise UsageError("k and ranks both say which experts a token visits; give one of them")
    for name, value in (("k", k), *(("ranks", rank) for rank in ranks)):
        if value is not None and not 1 <= value <= layer.num_experts:
            raise UsageError(
                f"{name}: {value}: {layer.path} has {layer.num_experts} experts; choose 1 to "
                f"{layer.num_experts}"
            )
    if len(set(ranks)) < len(ranks):
        raise UsageError(f"ranks: {list(ranks)} names one twice")


def _order(layer: RoutedLayer, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + layer.number)
    return torch.randperm(layer.num_experts, generator=generator)
