"""What an override does to the routing of one layer: plain data, and a function of tensors.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upcycle.routing.contract import (
    RoutedLayer,
    Routing,
    rescaled,
    routed_with,
    sums_to_the_same,
)

Remap = Callable[[int, Tensor], Tensor]  # the number of a layer and its index -> another index


@dataclass(frozen=True)
class Change:
    """Of one layer. What is empty changes nothing.

    Attributes:
        k: experts of a token, instead of the model's own number.
        ranks: which of the experts, from the best (1), a token visits.
        force: experts that every token visits.
        suppress: experts without weight.
        scale: factors of weights.
        order: [E], the expert that runs in the place of each; None for their own.
        remap: the last word about the index.
    """

    k: int | None = None
    ranks: tuple[int, ...] = ()
    force: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    scale: Mapping[int, float] = field(default_factory=dict)
    order: Tensor | None = None
    remap: Remap | None = None

    @property
    def reroutes(self) -> bool:
        """Whether experts are chosen anew."""
        return self.k is not None or bool(self.ranks)


def changed(
    layer: RoutedLayer, args: tuple[Any, ...], routing: Routing, changes: Sequence[Change]
) -> Routing:
    """The routing after all `changes`; of several choices anew the last one counts."""
    rerouting = [change for change in changes if change.reroutes]
    if rerouting:
        routing = _rerouted(layer, args, routing, rerouting[-1])
    logits, weights_TK, index_TK = routing
    total_T1 = weights_TK.sum(-1, keepdim=True) if sums_to_the_same(layer) else None
    for change in changes:
        weights_TK, index_TK = _edited(weights_TK, index_TK, total_T1, change)
        if change.remap is not None:
            index_TK = change.remap(layer.number, index_TK)
    return logits, weights_TK, index_TK


def _rerouted(
    layer: RoutedLayer, args: tuple[Any, ...], before: Routing, change: Change
) -> Routing:
    """The choice of `k` experts, or of those with the given ranks, by the router's own rules."""
    if not change.ranks:
        assert change.k is not None
        return routed_with(layer, args, change.k)
    most = max(change.ranks)
    if sorted(change.ranks) == [*range(1, most + 1)]:
        return routed_with(layer, args, most)
    chosen = {
        k: routed_with(layer, args, k) for rank in change.ranks for k in (rank, rank - 1) if k
    }
    logits, weights_TK, index_TK = routed_with(layer, args, most)
    columns = []
    for rank in change.ranks:  # the one that k = rank adds to k = rank - 1
        index_TR = chosen[rank][2]
        is_new_TR = torch.ones_like(index_TR, dtype=torch.bool)
        if rank > 1:
            is_new_TR = (index_TR[:, :, None] != chosen[rank - 1][2][:, None]).all(-1)
        expert_T1 = index_TR.gather(1, is_new_TR.int().argmax(1, keepdim=True))
        columns.append((index_TK == expert_T1).int().argmax(1, keepdim=True))
    column_TR = torch.cat(columns, 1)
    weights_TR, index_TR = weights_TK.gather(1, column_TR), index_TK.gather(1, column_TR)
    if sums_to_the_same(layer):
        weights_TR = rescaled(weights_TR, before[1].sum(-1, keepdim=True))
    return logits, weights_TR, index_TR


def _edited(
    weights_TK: Tensor, index_TK: Tensor, total_T1: Tensor | None, change: Change
) -> tuple[Tensor, Tensor]:
    """Force, suppress and scale experts, and put others in their places."""
    for expert in change.force:
        weights_TK, index_TK = _forced(weights_TK, index_TK, expert)
    if change.suppress:
        gone = index_TK.new_tensor(change.suppress)
        weights_TK = weights_TK.masked_fill(torch.isin(index_TK, gone), 0)
    if total_T1 is not None and (change.force or change.suppress):
        weights_TK = rescaled(weights_TK, total_T1)
    for expert, factor in change.scale.items():
        weights_TK = torch.where(index_TK == expert, weights_TK * factor, weights_TK)
    if change.order is not None:
        index_TK = change.order.to(index_TK.device)[index_TK].to(index_TK.dtype)
    return weights_TK, index_TK


def _forced(weights_TK: Tensor, index_TK: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens that do not visit `expert` do, with their largest weight, instead of the expert with
    the smallest one."""
    visits_T1 = ((index_TK == expert) & (weights_TK != 0)).any(-1, keepdim=True)
    least_T1 = weights_TK.argmin(-1, keepdim=True)
    most_T1 = weights_TK.max(-1, keepdim=True).values
    index = index_TK.scatter(-1, least_T1, torch.full_like(least_T1, expert).to(index_TK.dtype))
    weights = weights_TK.scatter(-1, least_T1, most_T1)
    return (
        torch.where(visits_T1, weights_TK, weights),
        torch.where(visits_T1, index_TK, index),
    )
