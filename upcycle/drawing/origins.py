"""What ``provenance.json`` tells of the layers of a conversion."""

from typing import Any

from upcycle.targets.provenance_file import LayerOrigin


def origin_facts(layer: LayerOrigin) -> dict[str, Any]:
    """What a picture tells of an MoE layer, as `upcycle.drawing.layers.moe_facts`.

    Raises:
        KeyError, TypeError, ValueError: the file is damaged.
    """
    made = layer["layer"]
    router, experts = made["router"], int(made["num_experts"])
    select = router["select"]
    return {
        "kind": "moe",
        "d_model": int(made["d_model"]),
        "num_experts": experts,
        "width": int(made["width"]),
        "top_k": min(int(select["k"]), experts),
        "shared": int(made["shared"]),
        "router": f"{router['kind']}, {select['rule']}, {router['weights']}",
    }
