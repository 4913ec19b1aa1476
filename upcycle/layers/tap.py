"""Put MoE layers into a model, wherever the dense FFN's linear maps are.

An FFN that is exactly one module is swapped. One that is spread over siblings (BERT) or applied
inline by its layer (OPT, nn.TransformerEncoderLayer) is *tapped*: the expansion becomes a `Tap`,
which hands its input to the MoE layer and returns a hidden tensor of width zero, on which every
pointwise operation is free; the contraction becomes a `TappedMoE`, which computes the whole layer
from that input. Where the model's own code reshapes the hidden tensor, the tap returns zeros of the
old width. A linear map of which only a part is the FFN's (a fused projection of attention and MLP)
still computes the rest: the tap returns zeros among it, and the contraction adds it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from upcycle.layers.config import LayerConfig
from upcycle.layers.moe import MoE
from upcycle.layers.token_context import ForwardState, tell_routers

# The attributes of a module that hold what watches or changes its inputs, outputs and gradients.
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks",
    "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what goes into a module, or comes out."""
    return any(vars(module).get(name) for name in HOOKS)


class _Absent(torch.Tensor):
    """An empty tensor that stands for a weight that is no longer there.

    As a subclass it makes fused fast paths, which would use the weight, step aside.
    """


class TappedMoE(MoE):
    """The MoE layer in the place of a contraction: it computes on the input of its expansion.

    Where other columns of the contraction map something else, `kept_weight` [O, C] holds them, and
    `columns` are the ``(start, stop)`` of the neurons between them.
    """

    def __init__(
        self, config: LayerConfig, *, columns: Sequence[int] = (), hidden: int = 0
    ) -> None:
        super().__init__(config)
        self.columns = tuple(columns)
        if columns:
            kept = torch.zeros(config.d_out, hidden - (columns[1] - columns[0]))
            self.kept_weight = nn.Parameter(kept)
        self.input = ForwardState()  # of the FFN, between its expansion and its contraction

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` gives the shape of the result, and the inputs of the columns that are kept."""
        x = self.input.take()
        if x is None:
            raise RuntimeError(
                "a contraction ran without its expansion: the forward of the model has changed "
                "since it was converted"
            )
        y = super().forward(x)
        shape = list(hidden.shape)
        shape[self.axis] = y.shape[self.axis]
        y = y.reshape(shape)
        if not self.columns:
            return y
        start, stop = self.columns
        others = hidden.movedim(self.axis, -1)
        others = torch.cat([others[..., :start], others[..., stop:]], -1)
        return y + F.linear(others, self.kept_weight).movedim(-1, self.axis)

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
    """In the place of an expansion: hands its input over, returns an empty hidden tensor."""

    _layer: TappedMoE

    def __init__(self, layer: TappedMoE, *, first: bool, width: int) -> None:
        super().__init__()
        self.first = first
        self.width = width
        # Not a registered child: the layer's parameters have one name, the contraction's.
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> zeros [..., width]."""
        if self.first:
            self._layer.input.put(x)
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


class PartialTap(nn.Module):
    """In the place of an expansion that also maps x to something else, which it still computes.

    `weight` [R, D] and `bias` [R] hold the rows that stay; `taken` are the ``(start, stop)`` of the
    FFN's rows, which come out as zeros, in the `width` of the dense map.
    """

    _layer: TappedMoE

    def __init__(
        self,
        layer: TappedMoE,
        *,
        first: bool,
        width: int,
        taken: Sequence[Sequence[int]],
        bias: bool,
    ) -> None:
        super().__init__()
        self.first = first
        self.width = width
        self.taken = [(int(start), int(stop)) for start, stop in taken]
        rows = width - sum(stop - start for start, stop in self.taken)
        self.weight = nn.Parameter(torch.zeros(rows, layer.config.d_model))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., width]."""
        if self.first:
            self._layer.input.put(x)
        z = F.linear(x.movedim(self._layer.axis, -1), self.weight, self.bias)
        pieces, done, at = [], 0, 0
        for start, stop in [*self.taken, (self.width, self.width)]:
            pieces.append(z[..., done : done + start - at])
            pieces.append(z.new_zeros(*z.shape[:-1], stop - start))
            done, at = done + start - at, stop
        return torch.cat(pieces, -1).movedim(-1, self._layer.axis)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"width={self.width}, taken={self.taken}"


def _taps(layer: TappedMoE, site: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """What goes in the place of each expansion."""
    paths, kept = site["expansions"], site.get("kept") or {}
    widths = site.get("tap_widths") or [0] * len(paths)
    for i, (path, width) in enumerate(zip(paths, widths, strict=True)):
        taken = kept["rows"][i] if kept else [[0, width]]
        if sum(stop - start for start, stop in taken) == width:
            yield path, Tap(layer, first=i == 0, width=width)
        else:
            bias = kept["biases"][i]
            yield path, PartialTap(layer, first=i == 0, width=width, taken=taken, bias=bias)


def place_of(site: Mapping[str, Any]) -> str:
    """The path of the `MoE` that `install` makes."""
    return str(site["path"] if site["placement"] == "module" else site["contraction"])


def install(model: nn.Module, sites: Sequence[Mapping[str, Any]]) -> list[MoE]:
    """Put an MoE layer, with weights of zero, at each site of the dense `model`, in place.

    A module that is registered at several places of `model` is replaced at all of them. What takes
    its place has its hooks.

    Args:
        sites: as ``MoESpec.site()`` describes them.

    Returns:
        The layers, in the order of `sites`.

    Raises:
        ValueError: a site describes a layer that this code does not know.
    """
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)

    def put(path: str, new: nn.Module) -> None:
        old = model.get_submodule(path)
        vars(new).update({name: vars(old)[name] for name in HOOKS})
        for place in places[id(old)]:
            model.set_submodule(place, new)

    layers: dict[str, MoE] = {}
    for site in sites:
        config = LayerConfig.from_json(site["layer"])
        if site["placement"] == "module":
            layer = MoE(config)
        else:
            kept = site.get("kept") or {"columns": (), "hidden": 0}
            layer = TappedMoE(config, columns=kept["columns"], hidden=kept["hidden"])
            for path, tap in _taps(layer, site):
                put(path, tap.train(model.training))
        layer.ffn_path = str(site["path"])
        put(place_of(site), layer)
        layers[place_of(site)] = layer.train(model.training)
    tell_routers(model, {path: layer.router for path, layer in layers.items()})
    return list(layers.values())
