"""Put MoE layers into a model, wherever the dense FFN's linear maps are.

An FFN that is exactly one module is swapped. One that is spread over siblings (BERT) or applied
inline by its layer (OPT, nn.TransformerEncoderLayer) is *tapped*: the expansion becomes a `Tap`,
which hands its input to the MoE layer and returns a hidden tensor of width zero, on which every
pointwise operation is free; the contraction becomes a `TappedMoE`, which computes the whole layer
from that input. The model's own code stays as it is. Where that code reshapes the hidden tensor,
the tap returns zeros of the old width.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from upcycle.moe import MoE


class _Remembered(threading.local):
    """The input of an FFN, between its expansion and its contraction; each thread has its own.

    A copy or a pickle of a model is not in the middle of a forward, so it remembers nothing.
    """

    x: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Remembered, ()


class _Absent(torch.Tensor):
    """An empty tensor that stands for a weight that is no longer there.

    As a subclass it makes fused fast paths, which would use the weight, step aside.
    """


class TappedMoE(MoE):
    """The MoE layer in the place of a contraction: it computes on what its taps were given."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._remembered = _Remembered()
        self._compiled_x: torch.Tensor | None = None  # what a compiler can follow

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled_x": None}

    def remember(self, x: torch.Tensor) -> None:
        """Keep the input of the FFN until the contraction runs."""
        if torch.compiler.is_compiling():
            self._compiled_x = x
        else:
            self._remembered.x = x

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` only gives the shape of the result, but for its axis of neurons."""
        x, self._compiled_x = self._compiled_x, None
        if not torch.compiler.is_compiling() and x is None:
            x, self._remembered.x = self._remembered.x, None
        if x is None:
            raise RuntimeError(
                "a contraction ran without its expansion: the forward of the model has changed "
                "since it was converted"
            )
        y = super().forward(x)
        shape = list(hidden.shape)
        shape[self.axis] = y.shape[self.axis]
        return y.reshape(shape)

    @property
    def weight(self) -> torch.Tensor:
        """Answers questions about dtype and device; holds nothing."""
        empty = self.experts.down_proj.new_empty(0)
        # Tensors of an exporter are subclasses already; fused paths step aside for them, too.
        return empty.as_subclass(_Absent) if type(empty) is torch.Tensor else empty

    @property
    def bias(self) -> torch.Tensor | None:
        """As `weight`; None where the dense FFN had no bias."""
        return None if self.output_bias is None else self.weight


class Tap(nn.Module):
    """In the place of an expansion: remembers its input, returns an empty hidden tensor."""

    _layer: TappedMoE

    def __init__(self, layer: TappedMoE, *, first: bool, width: int = 0) -> None:
        super().__init__()
        self.first = first
        self.width = width
        # Not a registered child: the layer's parameters have one name, the contraction's.
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> zeros [..., width]."""
        if self.first:
            self._layer.remember(x)
        shape = list(x.shape)
        shape[self._layer.axis] = self.width
        return x.new_zeros(shape)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"width={self.width}"

    @property
    def weight(self) -> torch.Tensor:
        """Answers questions about dtype and device; holds nothing."""
        return self._layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """As `weight`; None where the dense FFN had no bias."""
        return self.weight if self._layer.experts.has_bias else None


def install(model: nn.Module, sites: Sequence[Mapping[str, Any]]) -> list[MoE]:
    """Put an MoE layer, with weights of zero, at each site of `model`, in place.

    Args:
        model: the dense model; on the meta device the layers are made there too.
        sites: as ``MoESpec.site()`` describes them.

    A module that is registered at several places of `model` is replaced at all of them.

    Returns:
        The layers, in the order of `sites`.
    """
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)

    def put(path: str, new: nn.Module) -> None:
        for place in places[id(model.get_submodule(path))]:
            model.set_submodule(place, new)

    layers: list[MoE] = []
    for site in sites:
        if site["placement"] == "module":
            layer = MoE(site["layer"])
            put(site["path"], layer)
        else:
            layer = TappedMoE(site["layer"])
            widths = site.get("tap_widths") or [0] * len(site["expansions"])
            for i, (path, width) in enumerate(zip(site["expansions"], widths, strict=True)):
                put(path, Tap(layer, first=i == 0, width=width))
            put(site["contraction"], layer)
        layer.train(model.training)
        layers.append(layer)
    return layers
