"""Renumber experts by the devices that they are placed on."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from upcycle.errors import UsageError
from upcycle.operations.experts import check_order, take, tell_model
from upcycle.operations.placement import Placement
from upcycle.routing.contract import routed_layers
from upcycle.routing.trace import Trace
from upcycle.util.text_file import write_text

FILE = "placement.json"


def renumber(model: nn.Module, placement: Placement) -> None:
    """Give each device a block of neighbouring experts, in place; outputs move by rounding alone.

    Expert parallelism of transformers and of vLLM (its linear placement) hands out such blocks.

    Raises:
        UsageError: the placement is one of other layers.
        UnsupportedError: a router cannot follow.
    """
    layers = routed_layers(model)
    if [layer.num_experts for layer in layers] != [len(found) for found in placement.devices]:
        raise UsageError("the placement is not of the layers of this model; trace that model")
    for layer in layers:
        check_order(layer)
    for layer in layers:
        take(layer, placement.order(layer.number).tolist())
    counts = {layer.num_experts for layer in layers}
    if len(counts) == 1:
        tell_model(model, routed_layers(model), counts.pop())


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
