"""Put MoE layers into a model, wherever the dense FFN's linear maps are.

An FFN that is exactly one module is swapped. One that is spread over siblings (BERT) or applied
inline by its layer (OPT, nn.TransformerEncoderLayer) is *tapped*: the expansion becomes a `Tap`,
which hands its input to the MoE layer and returns a hidden tensor of width zero, on which every
pointwise operation is free; the contraction becomes a `TappedMoE`, which computes the whole layer
from that input. The model's own code stays as it is.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from upcycle.moe import MoE


class _Absent(torch.Tensor):
    """An empty tensor that stands for a weight that is no longer there.

    As a subclass it makes fused fast paths, which would use the weight, step aside.
    """


class TappedMoE(MoE):
    """The MoE layer in the place of a contraction: it computes on what its taps were given."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._tapped: dict[int, torch.Tensor] = {}
        self._tapped_compiled: torch.Tensor | None = None

    def remember(self, x: torch.Tensor) -> None:
        """Keep the input of the FFN, for each thread by itself, until the contraction runs."""
        if torch.compiler.is_compiling():
            self._tapped_compiled = x  # a plain attribute is what the compiler can follow
        else:
            self._tapped[threading.get_ident()] = x

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., 0] only gives the shape of the result, [..., O]."""
        if torch.compiler.is_compiling():
            x, self._tapped_compiled = self._tapped_compiled, None
        else:
            x = self._tapped.pop(threading.get_ident(), None)
        if x is None:
            raise RuntimeError(
                "a contraction ran without its expansion: the model's forward changed"
            )
        y = super().forward(x)
        shape = list(hidden.shape)
        shape[self.axis] = y.shape[self.axis]
        return y.reshape(shape)

    @property
    def weight(self) -> torch.Tensor:
        """Answers questions about dtype and device; holds nothing."""
        return self.experts.down_proj.new_empty(0).as_subclass(_Absent)

    @property
    def bias(self) -> torch.Tensor | None:
        """As `weight`; None where the dense FFN had no bias."""
        return None if self.output_bias is None else self.weight


class Tap(nn.Module):
    """In the place of an expansion: remembers its input, returns a hidden tensor of width zero."""

    def __init__(self, layer: TappedMoE, *, first: bool) -> None:
        super().__init__()
        self.first = first
        # Not a registered child: the layer's parameters have one name, the contraction's.
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., 0]."""
        layer: TappedMoE = self._layer
        if self.first:
            layer.remember(x)
        shape = list(x.shape)
        shape[layer.axis] = 0
        return x.new_empty(shape)

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

    Returns:
        The layers, in the order of `sites`.
    """
    layers: list[MoE] = []
    for site in sites:
        if site["placement"] == "module":
            layer: MoE = MoE(site["layer"])
            model.set_submodule(site["path"], layer)
        else:
            layer = TappedMoE(site["layer"])
            for i, path in enumerate(site["expansions"]):
                model.set_submodule(path, Tap(layer, first=i == 0))
            model.set_submodule(site["contraction"], layer)
        layer.train(model.training)
        layers.append(layer)
    return layers
