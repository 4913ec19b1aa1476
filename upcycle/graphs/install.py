"""Put MoE layers into a model: into its graph, if it is one, else in the place of its modules."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from upcycle.layers import tap
from upcycle.layers.config import LayerConfig
from upcycle.layers.moe import MoE
from upcycle.layers.token_context import tell_routers


def install(model: nn.Module, sites: Sequence[Mapping[str, Any]]) -> list[MoE]:
    """Put an MoE layer, with weights of zero, at each site of the dense `model`, in place.

    A site that is a region of a graph becomes one call of the layer, and what only that region read
    is removed; for the others see `upcycle.layers.tap.install`.

    Args:
        sites: as ``MoESpec.site()`` describes them.

    Returns:
        The layers, in the order of `sites`.

    Raises:
        ValueError: a site describes a layer that this code does not know, or a region of another
            graph.
    """
    regions = [site for site in sites if site.get("regions")]
    others = iter(tap.install(model, [site for site in sites if not site.get("regions")]))
    if regions and not isinstance(model, fx.GraphModule):
        raise ValueError("its layers are regions of a graph, and the model is none")
    layers = {}
    for site in regions:
        layer = MoE(LayerConfig.from_json(site["layer"]))
        layer.ffn_path = str(site["path"])
        layers[str(site["place"])] = layer.train(model.training)
    if isinstance(model, fx.GraphModule) and regions:
        _rewrite(model, {str(site["place"]): site["regions"] for site in regions}, layers)
        tell_routers(model, {path: layer.router for path, layer in layers.items()})
    return [layers[str(s["place"])] if s.get("regions") else next(others) for s in sites]


def _rewrite(
    model: fx.GraphModule,
    regions: Mapping[str, Sequence[Sequence[str]]],
    layers: Mapping[str, MoE],
) -> None:
    """Make each of the `regions`, by the path of its layer, a call of that."""
    # Only graphs need them, and networkx, which is slow to import.
    from torch.fx.passes.infra.pass_manager import PassManager

    from upcycle.graphs import layer_passes as passes

    model.graph = copy.deepcopy(model.graph)  # the one of the model may be read by others
    calls = passes.CallLayers(regions, layers)
    calls.requires(model)
    inside, read = passes.regions_inside(model.graph, regions), passes.targets_of(model.graph)
    PassManager([calls, passes.EraseUnread(inside), passes.HoldLayers(layers, read)])(model)
