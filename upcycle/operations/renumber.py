"""Renumber experts by the devices that they are placed on."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.errors import UsageError, VerificationError
from upcycle.operations.experts import check_order, take
from upcycle.operations.placement import Placement
from upcycle.routing.contract import RoutedLayer, routed_layers
from upcycle.routing.trace import Trace
from upcycle.util.text_file import write_text

FILE = "placement.json"
# Of the largest output, in float64. Native routers give weights in float32: 16 times its eps.
SAME = 2e-6
_TOKENS = 64


def renumber(model: nn.Module, placement: Placement) -> None:
    """Give each device a block of neighbouring experts, in place.

    Each layer computes the same, which is checked in float64: in the type of the model sums come in
    another order, and where two experts are nearly as good for a token, that can choose the other.
    Expert parallelism of transformers and of vLLM (its linear placement) hands out such blocks.

    Raises:
        VerificationError: a layer computes something else.
        UsageError: the placement is one of other layers.
        UnsupportedError: a router cannot follow.
    """
    layers = routed_layers(model)
    if [layer.num_experts for layer in layers] != [len(found) for found in placement.devices]:
        raise UsageError("the placement is not of the layers of this model; trace that model")
    for layer in layers:
        check_order(layer)
    for layer in layers:
        before = _in_float64(layer)
        take(layer, placement.order(layer.number).tolist())
        moved = float((_in_float64(layer) - before).abs().max() / before.abs().max())
        if not moved <= SAME:
            raise VerificationError(
                f"{layer.path}: renumbered it is {moved:.1e} off, and {SAME:.0e} is allowed; "
                "please report it"
            )


@torch.no_grad()
def _in_float64(layer: RoutedLayer) -> torch.Tensor:
    """What the layer computes of random tokens, [1, T, O]."""
    block: Any = copy.deepcopy(layer.block).double().cpu().eval()
    found: Any = next(module for module in block.children() if type(module) is type(layer.experts))
    found.config._experts_implementation = "eager"
    own: Any = layer.experts
    d_model: int = getattr(own, "hidden_dim", None) or own.hidden_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, _TOKENS, d_model, generator=generator, dtype=torch.float64)
    made = block.tokens(tokens[0]) if hasattr(block, "tokens") else block(tokens)
    out: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return out.reshape(1, _TOKENS, -1)


def write_plan(path: Path, trace: Trace, placement: Placement, devices: int, nodes: int) -> None:
    """Write which device holds which experts, by their new numbers, and what that costs."""
    layers: dict[str, Any] = {}
    for layer, name in enumerate(trace.paths):
        order = placement.order(layer).tolist()
        size = len(order) // devices
        layers[name] = {
            "was": order,  # the old number of each expert
            "devices": [[*range(c * size, (c + 1) * size)] for c in range(devices)],
        }
    data = {
        "form": 1,
        "devices": devices,
        "nodes": nodes,
        "hops_per_token_and_layer": {
            "placed": placement.cost,
            "contiguous": placement.contiguous,
            "random": placement.random,
        },
        "is_best": placement.is_best,
        "layers": layers,
    }
    write_text(path, json.dumps(data, indent=1) + "\n")
