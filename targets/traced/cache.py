"""Key-value caches as the flat inputs and outputs of a graph, named as optimum names them.

Every layer keeps its whole past, also one that attends to a window of it: its mask hides the rest.
So one past length serves all layers, and it may be 0.

Shape suffixes: B batch, H heads of keys and values, P past, S new tokens, W width of a head.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from upcycle.errors import UnsupportedError
from upcycle.util.modules import set_within

PAST, PRESENT = "past_key_values", "present"
_ARGUMENTS = ("cache", "past_key_values")  # of a forward: since transformers 5.24, and before
_KEPT = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class CacheShape:
    """The shapes of a cache.

    Attributes:
        count: the number of layers.
        heads: heads and width of the keys and of the values, by layer; layers that use the cache
            of another one have no entry.
        dtype: of keys and values.
        part: stands in the names between the layer and the kind, such as ``.decoder``.
    """

    count: int
    heads: Mapping[int, tuple[tuple[int, int], tuple[int, int]]]
    dtype: torch.dtype
    part: str = ""

    def names(self, prefix: str) -> list[str]:
        """``<prefix>.<layer><part>.key`` and ``.value``, layer by layer."""
        return [f"{prefix}.{i}{self.part}.{what}" for i in self.heads for what in ("key", "value")]

    def zeros(self, batch: int, length: int) -> dict[str, Tensor]:
        """A past of `length` tokens: tensors [B, H, P, W] by the names of the inputs."""
        sizes = [size for pair in self.heads.values() for size in pair]
        return {
            name: torch.zeros(batch, heads, length, width, dtype=self.dtype)
            for name, (heads, width) in zip(self.names(PAST), sizes, strict=True)
        }


def cache_argument(model: nn.Module) -> str:
    """The name under which the forward of `model` takes its cache.

    Raises:
        UnsupportedError: it takes none.
    """
    for name in _ARGUMENTS:
        if name in inspect.signature(model.forward).parameters:
            return name
    raise UnsupportedError("its forward has no argument for a cache")


def cache_in(output: object) -> object:
    """The cache that a model returned with its `output`; None if there is none."""
    found = (getattr(output, name, None) for name in _ARGUMENTS)
    return next((cache for cache in found if cache is not None), None)


def shape_of(cache: object, part: str = "") -> CacheShape:
    """The shape of a cache that a model returned; for `part` see `CacheShape`.

    Raises:
        UnsupportedError: it is not made of keys and values that grow with the text.
    """
    if not isinstance(cache, Cache) or not cache.layers:
        raise UnsupportedError(f"it returns {type(cache).__name__} where its cache should be")
    heads = {}
    dtype = torch.float32
    for i, layer in enumerate(cache.layers):
        keys, values = _tensors(layer)
        if isinstance(layer, DummyLayer) or (type(layer) is DynamicLayer and keys is None):
            continue
        if type(layer) not in _KEPT or keys is None or values is None or keys.dim() != 4:
            raise UnsupportedError(
                f"layer {i} remembers a {type(layer).__name__} and not keys and values of all "
                "tokens, which is what a graph can hand on"
            )
        heads[i] = ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
        dtype = keys.dtype
    return CacheShape(len(cache.layers), heads, dtype, part)


def filled(shape: CacheShape, past: Mapping[str, Tensor]) -> DynamicCache:
    """The cache that holds `past`, whose names are those of `shape`, as a model reads it."""
    cache = DynamicCache()
    for i in range(shape.count):
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        if i in shape.heads:  # as `update` would do, which concatenates with an empty tensor first
            layer.keys, layer.values = (
                past[f"{PAST}.{i}{shape.part}.{what}"] for what in ("key", "value")
            )
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def tensors_of(shape: CacheShape, cache: object) -> dict[str, Tensor]:
    """The tensors of `cache` by the names of the outputs."""
    assert isinstance(cache, Cache)
    tensors = [tensor for i in shape.heads for tensor in _tensors(cache.layers[i])]
    return {
        name: tensor
        for name, tensor in zip(shape.names(PRESENT), tensors, strict=True)
        if tensor is not None
    }


def _tensors(layer: object) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of a layer of a cache, if it has them."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within it the model goes from token ids to outputs, without a key-value cache."""
    config: Any = getattr(model, "config", None)
    with ExitStack() as undo:
        if getattr(config, "use_cache", None) is not None:
            set_within(undo, config, "use_cache", False)
        yield
