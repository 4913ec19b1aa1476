"""Put MoE layers into a model: into its graph, if it is one, else in the place of its modules."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from upcycle.graph.region import between, digraph
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
    graph = copy.deepcopy(model.graph)  # the one of the model may be read by others
    named = {node.name: node for node in graph.nodes}
    before = _targets(graph)
    flow = digraph(graph)
    inside: set[fx.Node] = set()
    calls: dict[fx.Node, fx.Node] = {}
    try:
        places = [(p, named[x], named[out]) for p, ends in regions.items() for x, out in ends]
    except KeyError as error:
        raise ValueError(f"the graph has no node {error}; it is another program") from error
    for _, x, output in places:
        inside |= between(flow, x, output)
    for path, x, output in places:
        with graph.inserting_before(output):
            call = graph.call_module(path, (calls.get(x, x),))
        call.meta = output.meta.copy()
        output.replace_all_uses_with(call)
        calls[output] = call
    feeding = {node for inner in inside for node in inner.all_input_nodes}
    for node in reversed(graph.nodes):
        if not node.users and node in inside | feeding and node.op != "placeholder":
            feeding.update(node.all_input_nodes)
            graph.erase_node(node)
    gone = before - _targets(graph)
    _erase_aliases(model, graph, gone)
    for path, layer in layers.items():
        _put(model, path, layer)
    graph.owning_module = model
    for target in before - _targets(graph):
        if not any(f"{target}.".startswith(f"{path}.") for path in layers):
            _remove(model, target)
    model.graph = graph
    graph.lint()
    model.recompile()


def _targets(graph: fx.Graph) -> set[str]:
    """The modules, parameters and buffers that the graph reads, by name."""
    return {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}


def _erase_aliases(model: nn.Module, graph: fx.Graph, gone: set[str]) -> None:
    """Erase what reads a weight that is `gone` by another of its names, and hands it to nothing."""
    weights = {id(_attribute(model, target)) for target in gone}
    for node in graph.find_nodes(op="get_attr"):
        if not node.users and id(_attribute(model, str(node.target))) in weights:
            graph.erase_node(node)


def _attribute(model: nn.Module, target: str) -> object:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name)


def _remove(model: nn.Module, target: str) -> None:
    """Delete what nothing reads now, and what was there to hold it alone."""
    path, _, name = target.rpartition(".")
    holder = model.get_submodule(path)
    delattr(holder, name)
    is_empty = not (holder._parameters or holder._buffers or holder._modules)
    if path and is_empty and type(holder) is nn.Module:
        _remove(model, path)


def _put(model: nn.Module, path: str, layer: MoE) -> None:
    """Set the module at `path`, with whatever has to hold it."""
    *holders, name = path.split(".")
    holder = model
    for part in holders:
        if not isinstance(getattr(holder, part, None), nn.Module):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if hasattr(holder, name):
        delattr(holder, name)
    holder.add_module(name, layer)
