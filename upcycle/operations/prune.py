"""Remove the experts of a mixture that matter least on some data.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UsageError
from upcycle.layers.experts import Experts
from upcycle.models.moe_layers import as_experts
from upcycle.operations.experts import check_order, is_own, take, tell_model
from upcycle.passes.calibrate.sites import run_batch
from upcycle.routing.contract import RoutedLayer, Routing, routed_layers
from upcycle.routing.views import View, opened
from upcycle.util.modules import eval_mode

By = Literal["frequency", "mass", "norm"]
_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def importance(
    model: nn.Module, batches: Sequence[ExampleInputs], by: By
) -> dict[str, torch.Tensor]:
    """How much each expert matters on `batches`, [E] for each layer by path.

    ``frequency`` is the number of tokens that visit it, ``mass`` the sum of their weights, and
    ``norm`` the sum of the lengths of what it adds to them: weight times |E(x)|.
    """
    layers = routed_layers(model)
    found = {layer.path: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers}
    inputs: dict[str, torch.Tensor] = {}
    experts: Mapping[str, Experts] = {}
    if by == "norm":
        experts = {
            layer.path: layer.experts
            if isinstance(layer.experts, Experts)
            else as_experts(layer.experts, layer.path)
            for layer in layers
        }

    def see(layer: RoutedLayer, routing: Routing) -> None:
        _, weights_TK, index_TK = routing
        values_TK = (weights_TK != 0).double() if by == "frequency" else weights_TK.abs().double()
        if by == "norm":
            values_TK = values_TK * _lengths(experts[layer.path], inputs[layer.path], routing)
        index = index_TK.reshape(-1).clamp(0, layer.num_experts - 1).cpu()
        found[layer.path].index_add_(0, index, values_TK.reshape(-1).cpu())

    def keep(path: str, args: tuple[Any, ...]) -> None:
        inputs[path] = args[0].reshape(-1, args[0].shape[-1])

    hooks = [
        layer.router.register_forward_pre_hook(lambda _, args, path=layer.path: keep(path, args))
        for layer in layers
    ]
    try:
        with eval_mode(model), opened(model, View(tuple(layers), seen=see)):
            for batch in batches:
                run_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _lengths(experts: Experts, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """|E(x)| of every visit, [T, K]."""
    _, weights_TK, index_TK = routing
    found = torch.zeros(index_TK.shape, dtype=torch.float64, device=x_TD.device)
    for expert in range(experts.num_experts):
        token, slot = torch.where((index_TK == expert) & (weights_TK != 0))
        if len(token):
            length = experts.expert(expert, x_TD[token].to(experts.down_proj.dtype)).norm(dim=-1)
            found[token, slot] = length.double()
    return found


@dataclass(frozen=True)
class Pruned:
    """What was removed.

    Attributes:
        left: the experts that are left, by path, in their old numbers.
        shares: of each expert before, [E] by path: its part of the importance of its layer.
        widest: the layer that needs most experts, if all have as many because the architecture has
            one number for all of them.
    """

    left: dict[str, tuple[int, ...]]
    shares: dict[str, torch.Tensor]
    widest: str | None = None


def prune(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    keep: int | None = None,
    *,
    below: float | None = None,
    by: By = "norm",
) -> Pruned:
    """Remove the experts of each layer that matter least on `batches`, in place.

    Routers choose among those that are left, and weights that sum to one by rule still do. It is
    not exact, but where the data and all later inputs visit no removed expert.

    Args:
        model: with layers of upcycle whose routers are linear, or a native one.
        keep: so many are left in each layer; or
        below: those with a smaller share of the importance of their layer go, but as many stay as a
            token visits. Layers of upcycle may have different numbers; a native architecture has
            one, which is then the largest need.
        by: see `importance`.

    Raises:
        UsageError: neither or both of `keep` and `below` are given, one of them is out of range, or
            the data never reach a layer.
        UnsupportedError: a router cannot follow.
    """
    layers = routed_layers(model)
    _check(layers, keep, below)
    found = importance(model, batches, by)
    shares = {path: score_E / score_E.sum().clamp(min=_TINY) for path, score_E in found.items()}
    if keep is not None:
        counts = {layer.path: keep for layer in layers}
    else:
        assert below is not None
        empty = [path for path, score_E in found.items() if not score_E.any()]
        if empty:
            raise UsageError(f"{empty[0]}: the data never reach this layer; give other data")
        counts = {
            layer.path: max(int((shares[layer.path] >= below).sum()), layer.top_k or 1)
            for layer in layers
        }
    widest = None
    if len(set(counts.values())) > 1 and not all(is_own(layer) for layer in layers):
        widest = max(counts, key=lambda path: counts[path])
        counts = dict.fromkeys(counts, counts[widest])
    left = {}
    for layer in layers:
        best = found[layer.path].topk(counts[layer.path]).indices.sort().values.tolist()
        take(layer, best)
        left[layer.path] = tuple(best)
    tell_model(model, routed_layers(model))
    return Pruned(left, shares, widest)


def _check(layers: Sequence[RoutedLayer], keep: int | None, below: float | None) -> None:
    """Refuse what no layer can be pruned to, before anything is run."""
    if (keep is None) == (below is None):
        raise UsageError("give one of keep and below")
    if below is not None and not 0 < below < 1:
        raise UsageError(f"below: {below} is no share of a layer; choose more than 0 and below 1")
    for layer in layers:
        least = layer.top_k or 1
        if keep is not None and not least <= keep <= layer.num_experts:
            raise UsageError(
                f"keep: {keep}: {layer.path} has {layer.num_experts} experts, of which a token "
                f"visits {least}; choose {least} to {layer.num_experts}"
            )
        check_order(layer)
