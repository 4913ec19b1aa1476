"""Record which experts tokens visit.

Shape suffixes: T tokens, L layers, E experts, K chosen experts at most.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from upcycle.errors import UsageError
from upcycle.routing.contract import RoutedLayer, Routing, routed_layers
from upcycle.routing.views import View, is_open, opened

_FORM = 1  # of the file


@dataclass(frozen=True)
class Trace:
    """The visits of tokens to experts. In each array a row is a token of one layer.

    Padding is left out. Where a token visits fewer than K experts the rest has weight 0 and index
    -1.

    Attributes:
        paths: of the L layers.
        num_experts: E of each.
        index: of each layer [T, K], int32.
        weights: of each layer [T, K], float32.
        token: of each layer [T], int64: rows with the same number are the same token, in whatever
            layer; an encoder and a decoder have different ones.
        sequence: of each layer [T], int64: the sequence that a token is of, counted over all calls.
        classes: of each sequence, if they have any.
        data: what the tokens are of, in a few words, if that is known.
    """

    paths: tuple[str, ...]
    num_experts: tuple[int, ...]
    index: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    token: tuple[np.ndarray, ...]
    sequence: tuple[np.ndarray, ...]
    classes: tuple[str, ...] = ()
    data: str = ""

    def save(self, path: str | Path) -> None:
        """Write it as an ``.npz`` file, without pickle."""
        arrays: dict[str, Any] = {"form": _FORM, "paths": self.paths, "experts": self.num_experts}
        arrays |= {"classes": np.array(self.classes, dtype=str), "data": self.data}
        for name in _PER_LAYER:
            arrays |= {f"{name}.{i}": array for i, array in enumerate(getattr(self, name))}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what `save` wrote.

        Raises:
            UsageError: there is no such file, or it is no trace.
        """
        try:
            with Path(path).open("rb") as held, np.load(held) as file:
                if int(file["form"]) != _FORM:
                    raise UsageError(f"{path}: a trace of another version; record it again")
                paths = tuple(map(str, file["paths"]))
                experts = tuple(map(int, file["experts"]))
                layers = range(len(paths))
                arrays: dict[str, Any] = {
                    name: tuple(file[f"{name}.{i}"] for i in layers) for name in _PER_LAYER
                }
                classes = tuple(map(str, file["classes"]))
                data = str(file["data"]) if "data" in file else ""  # the first version had none
                found = cls(paths, experts, **arrays, classes=classes, data=data)
        except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
            raise UsageError(f"{path}: no trace that `upcycle trace` wrote ({error})") from error
        _check(found, path)
        return found


_PER_LAYER = ("index", "weights", "token", "sequence")


def _check(trace: Trace, path: str | Path) -> None:
    """Refuse arrays that do not fit each other.

    Raises:
        UsageError: they do not.
    """
    for i, experts in enumerate(trace.num_experts):
        index, weights = trace.index[i], trace.weights[i]
        rows = [trace.token[i], trace.sequence[i]]
        fits = index.ndim == 2 and index.shape == weights.shape and weights.dtype.kind == "f"
        fits = fits and all(row.shape == index.shape[:1] and row.dtype.kind == "i" for row in rows)
        fits = fits and index.dtype.kind == "i" and bool((index >= -1).all())
        if not fits or (index.size and index.max() >= experts) or not np.isfinite(weights).all():
            raise UsageError(f"{path}: no trace that `upcycle trace` wrote: its arrays do not fit")


@dataclass
class Recorder:
    """What a `trace` block has seen so far."""

    layers: Sequence[RoutedLayer]
    _rows: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = field(default_factory=list)
    _calls: int = 0
    _tokens: int = 0
    _sequences: int = 0
    _masks: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows = [[] for _ in self.layers]

    def result(self) -> Trace:
        """The trace up to now."""
        lists: dict[str, list[np.ndarray]] = {name: [] for name in _PER_LAYER}
        for rows in self._rows:
            k = max((index.shape[1] for index, *_ in rows), default=0)
            rows = rows or [_NOTHING]
            parts = [(_padded(index, k, -1), _padded(w, k, 0), *more) for index, w, *more in rows]
            for name, column in zip(_PER_LAYER, zip(*parts, strict=True), strict=True):
                lists[name].append(torch.cat(column).numpy())
        arrays: dict[str, Any] = {name: tuple(lists[name]) for name in _PER_LAYER}
        return Trace(
            tuple(layer.path for layer in self.layers),
            tuple(layer.num_experts for layer in self.layers),
            **arrays,
        )

    def begin(self, masks: list[Tensor], *, goes_on: bool) -> None:
        """A call of the model starts, on batches with these masks [B, S] of real tokens; it may go
        on with the sequences of the call before."""
        self._tokens += sum(mask.numel() for mask in self._masks)
        if not goes_on:
            self._sequences += max((len(mask) for mask in self._masks), default=0)
        self._masks = masks

    def see(self, layer: RoutedLayer, routing: Routing) -> None:
        """A layer has routed."""
        _, weights_TK, index_TK = (part.detach() for part in routing)
        weights_TK, index_TK = weights_TK.float().cpu(), index_TK.int().cpu()
        index_TK = index_TK.masked_fill(weights_TK == 0, -1)
        first = 0
        for mask_BS in self._masks:
            if mask_BS.numel() == len(index_TK):
                break
            first += mask_BS.numel()
        else:  # tokens that are not those of an input: pixels, or experts of a layer run alone
            mask_BS = torch.ones(1, len(index_TK), dtype=torch.bool)
            self._masks.append(mask_BS)
        keep_T = mask_BS.reshape(-1)
        token_T = self._tokens + first + torch.arange(len(keep_T))
        batch = len(mask_BS)
        sequence_T = self._sequences + torch.arange(batch).repeat_interleave(len(keep_T) // batch)
        rows = (index_TK, weights_TK, token_T, sequence_T)
        self._rows[layer.number].append(tuple(part[keep_T] for part in rows))  # type: ignore[arg-type]


def _padded(tensor_TK: Tensor, k: int, value: int) -> Tensor:
    return nn.functional.pad(tensor_TK, (0, k - tensor_TK.shape[1]), value=value)


@contextmanager
def trace(model: nn.Module) -> Iterator[Recorder]:
    """Within it every visit of a token to an expert is recorded; ``.result()`` is the `Trace`.

    It sees the routing after all `override` blocks around it or in it, under ``generate()`` too,
    and leaves out what the attention mask hides. Layers leave their fused call, so that outputs may
    move by rounding.

    Raises:
        UsageError, UnsupportedError: as `override`.
    """
    layers = routed_layers(model)
    recorder = Recorder(layers)
    view = View(tuple(layers), seen=recorder.see)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_open(view):
            recorder.begin(_masks(args, kwargs), goes_on=_goes_on(kwargs))

    with ExitStack() as undo, opened(model, view):
        undo.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        yield recorder


_NOTHING = (
    torch.zeros(0, 0, dtype=torch.int32),
    torch.zeros(0, 0),
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(0, dtype=torch.int64),
)
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    """Whether a cache holds what came before."""
    caches = (kwargs.get(name) for name in ("past_key_values", "cache"))
    return any(cache is not None and cache.get_seq_length() > 0 for cache in caches)


def _masks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Which of the tokens of each input are real, [B, S]."""
    given = {**dict(zip(_INPUTS, args[:1], strict=False)), **kwargs}
    masks = []
    for name in _INPUTS:
        tokens = given.get(name)
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            continue
        shape = tokens.shape[:2]
        side = "decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"
        mask = given.get(side)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shape[1]:
            mask = mask[:, mask.shape[1] - shape[1] :].bool().cpu()
        else:
            mask = torch.ones(shape, dtype=torch.bool)
        masks.append(mask)
    return masks
