"""Remove the experts of a mixture that matter least on some data.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UsageError
from upcycle.layers.experts import Experts
from upcycle.models.moe_layers import as_experts
from upcycle.operations.experts import check_order, take, tell_model
from upcycle.passes.calibrate.sites import run_batch
from upcycle.routing.contract import RoutedLayer, Routing, routed_layers
from upcycle.routing.views import View, opened
from upcycle.util.modules import eval_mode

By = Literal["frequency", "mass", "norm"]


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


def prune(
    model: nn.Module, batches: Sequence[ExampleInputs], keep: int, *, by: By = "norm"
) -> dict[str, tuple[int, ...]]:
    """Leave the `keep` experts of each layer that matter most on `batches`, in place.

    Routers choose among those that are left, and weights that sum to one by rule still do. It is
    not exact, but where the data and all later inputs visit no removed expert.

    Args:
        model: with layers of upcycle whose routers are linear, or a native one.
        by: see `importance`.

    Returns:
        The experts that are left, by path, in their old numbers.

    Raises:
        UsageError: `keep` is less than a token visits, or more than there are.
        UnsupportedError: a router cannot follow.
    """
    layers = routed_layers(model)
    for layer in layers:
        least = layer.top_k or 1
        if not least <= keep <= layer.num_experts:
            raise UsageError(
                f"keep: {keep}: {layer.path} has {layer.num_experts} experts, of which a token "
                f"visits {least}; choose {least} to {layer.num_experts}"
            )
        check_order(layer)
    scores = importance(model, batches, by)
    left = {}
    for layer in layers:
        best = scores[layer.path].topk(keep).indices.sort().values.tolist()
        take(layer, best)
        left[layer.path] = tuple(best)
    tell_model(model, routed_layers(model), keep)
    return left
