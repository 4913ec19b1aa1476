"""Serve several expert adapters over one model, in one batch.

Shape suffixes: T tokens, K chosen experts, E experts, A adapters, N their experts in a layer.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.errors import UsageError
from upcycle.operations.expert_adapter import ExpertAdapter, stacks_of
from upcycle.routing.contract import RoutedLayer, routed_layers

BASE = -1  # the adapter of a sequence that has none


@dataclass
class Serving:
    """What holds within a block of `adapters`.

    Attributes:
        adapter_ids: for each sequence of the batches that follow, the number of its adapter, or -1
            for the model alone; set it between batches. One for all if there is one alone.
    """

    adapter_ids: Sequence[int]
    _count: int

    def of_tokens(self, tokens: int) -> Tensor:
        """The adapter of each token, [T] int64, or -1.

        Raises:
            UsageError: the ids are not those of this batch.
        """
        ids = torch.tensor(list(self.adapter_ids), dtype=torch.int64)
        if not len(ids) or tokens % len(ids) or ids.min() < BASE or ids.max() >= self._count:
            raise UsageError(
                f"adapter_ids: {list(self.adapter_ids)} are not the numbers of {self._count} "
                f"adapters (or {BASE}), one for each sequence of a batch of {tokens} tokens"
            )
        return ids.repeat_interleave(tokens // len(ids))


@contextmanager
def adapters(
    model: nn.Module, adapters: Sequence[ExpertAdapter], adapter_ids: Sequence[int] = (0,)
) -> Iterator[Serving]:
    """Within it each sequence of a batch has the experts of its own adapter.

    Routers and all other weights are those of `model`; where a token chooses an expert that its
    adapter has, that one runs instead. Sequences without an adapter compute what they did: bit for
    bit in a native model if no other sequence of the batch has one, else to rounding, as sums are
    taken in other blocks and layers of upcycle leave their fused call. Memory is that of the model
    and of the adapters' experts.

    A single adapter can be trained here: its parameters get gradients, and only experts of the
    adapter move. Not for several threads with batches of different adapters at once.

    Args:
        model: the one that the adapters were made of, ours or native; left alone.
        adapter_ids: see `Serving`.

    Raises:
        UsageError: an adapter is of another model.

    Source:
        Yu et al., "ExpertWeave", 2025, https://arxiv.org/abs/2508.17624
    """
    if not adapters:
        raise UsageError("adapters: there is none")
    for adapter in adapters:
        adapter.layers_in(model)
    serving = Serving(adapter_ids, len(adapters))
    with ExitStack() as undo:
        for layer in routed_layers(model):
            beside = _Beside(layer, adapters, serving)
            if beside.experts is not None:
                experts = layer.experts
                before = experts.register_forward_pre_hook(beside.before, with_kwargs=True)
                undo.callback(before.remove)
                undo.callback(experts.register_forward_hook(beside.after).remove)
        yield serving


def remap_table(layer: RoutedLayer, adapters: Sequence[ExpertAdapter]) -> Tensor:
    """For each adapter and expert the place of the expert that stands in for it among those of all
    adapters, or -1, [A + 1, E] int64; the last row, which index -1 reads, is that of the model."""
    table = torch.full((len(adapters) + 1, layer.num_experts), -1)
    start = 0
    for number, adapter in enumerate(adapters):
        chosen = adapter.experts.get(layer.path, ())
        table[number, list(chosen)] = torch.arange(start, start + len(chosen))
        start += len(chosen)
    return table


class _Beside:
    """The experts of all adapters for one layer, which run beside those of the layer."""

    def __init__(
        self, layer: RoutedLayer, adapters: Sequence[ExpertAdapter], serving: Serving
    ) -> None:
        self.table, self.serving = remap_table(layer, adapters), serving
        having = [adapter for adapter in adapters if layer.path in adapter.experts]
        self.experts = _experts_of(layer, having) if having else None
        self.extra: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Take the weight of what is remapped from the layer's own experts."""
        if kwargs:  # under whatever names
            args, kwargs = (*args, *kwargs.values()), {}
        x_TD, index_TK, weights_TK, *others = args
        adapter_T = self.serving.of_tokens(len(index_TK)).to(index_TK.device)
        table = self.table.to(index_TK.device)
        place_TK = table[adapter_T[:, None], index_TK.clamp(0, table.shape[1] - 1)]
        place_TK = torch.where(weights_TK == 0, -1, place_TK)
        token = (place_TK >= 0).any(1).nonzero().squeeze(1)
        place, weights = place_TK[token], weights_TK[token]
        self.extra = token, x_TD[token], place.clamp(min=0), torch.where(place < 0, 0, weights)
        return (x_TD, index_TK, torch.where(place_TK < 0, weights_TK, 0), *others), kwargs

    def after(self, _: nn.Module, __: Any, y_TO: Tensor) -> Tensor:
        """Add what the experts of the adapters give."""
        assert self.extra is not None
        assert self.experts is not None
        (token, *given), self.extra = self.extra, None
        if not len(token):
            return y_TO
        return y_TO.index_add(0, token, self.experts(*given).to(y_TO.dtype))


def _experts_of(layer: RoutedLayer, adapters: Sequence[ExpertAdapter]) -> Any:
    """A module like the experts of the layer, with those of the adapters alone."""
    made: Any = copy.copy(layer.experts)
    made._parameters = dict(layer.experts._parameters)
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()
    stacks: list[dict[str, Any]] = [dict(adapter.stacks(layer.path)) for adapter in adapters]
    for name, stack in stacks_of(layer).items():
        rows = [named[name].to(device=stack.device, dtype=stack.dtype) for named in stacks]
        # One adapter may be trained, so these are its own parameters.
        made._parameters[name] = (
            rows[0]
            if len(rows) == 1
            else nn.Parameter(torch.cat([one.detach() for one in rows]), requires_grad=False)
        )
    made.num_experts = sum(len(adapter.experts[layer.path]) for adapter in adapters)
    return made
