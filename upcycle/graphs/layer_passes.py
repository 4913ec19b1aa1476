"""The passes that put layers into a graph of torch.fx, each with what it needs and leaves.

They are `torch.fx.passes.infra` passes, so that its `PassManager` runs them and a test can call the
conditions of one alone.
"""

from collections.abc import Mapping, Sequence

import networkx as nx
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from upcycle.graphs.closed_region import between, flow_of
from upcycle.layers.moe import MoE

Ends = Sequence[Sequence[str]]  # names of the nodes (x, output) of each place of an FFN


class CallLayers(PassBase):
    """Call the layer of each region beside it, and let all that read the region read that."""

    def __init__(self, regions: Mapping[str, Ends], layers: Mapping[str, MoE]) -> None:
        self.regions, self.layers = regions, layers

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The graph has the nodes that the regions begin and end with.

        Raises:
            ValueError: it is another graph.
        """
        named = {node.name: node for node in graph_module.graph.nodes}
        flow = flow_of(graph_module.graph)
        for x, output in self._places():
            if x not in named or output not in named:
                missing = x if x not in named else output
                raise ValueError(f"the graph has no node {missing}; it is another program")
            if not nx.has_path(flow, named[x], named[output]):
                raise ValueError(f"node {output} does not depend on {x}; it is another program")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """One call for each region; the layers are not there yet."""
        graph = graph_module.graph
        named = {node.name: node for node in graph.nodes}
        calls: dict[fx.Node, fx.Node] = {}
        for path, ends in self.regions.items():
            for x, output in ((named[x], named[output]) for x, output in ends):
                with graph.inserting_before(output):
                    call = graph.create_node("call_module", path, (calls.get(x, x),))
                call.meta = output.meta.copy()
                output.replace_all_uses_with(call)
                calls[output] = call
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Nothing reads the end of a region."""
        ends = {output for _, output in self._places()}
        read = [node for node in graph_module.graph.nodes if node.name in ends and node.users]
        assert not read, f"{read} are still read"

    def _places(self) -> list[Sequence[str]]:
        return [ends for several in self.regions.values() for ends in several]


class EraseUnread(PassBase):
    """Erase what only a region read: its nodes, and the weights that they used, by any name."""

    def __init__(self, inside: set[str]) -> None:
        self.inside = inside

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The nodes are erased; parameters stay where they are."""
        graph = graph_module.graph
        nodes = {node for node in graph.nodes if node.name in self.inside}
        nodes |= {node for inner in nodes for node in inner.all_input_nodes}
        before = targets_of(graph)
        for node in reversed(graph.nodes):
            if node in nodes and not node.users and node.op != "placeholder":
                nodes.update(node.all_input_nodes)
                graph.erase_node(node)
        weights = {id(_attribute(graph_module, name)) for name in before - targets_of(graph)}
        for node in graph.find_nodes(op="get_attr"):
            if not node.users and id(_attribute(graph_module, str(node.target))) in weights:
                graph.erase_node(node)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """No node of a region is left, but for those that others read, as casts of its input."""
        inside = [node for node in graph_module.graph.nodes if node.name in self.inside]
        left = [node for node in inside if not node.users]
        assert not left, f"{left} are still there"


class HoldLayers(PassBase):
    """Put the layers where the calls name them, and drop the weights that nothing reads now."""

    def __init__(self, layers: Mapping[str, MoE], read_before: set[str]) -> None:
        self.layers, self.read_before = layers, read_before

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The module has the layers, and no parameter of a converted FFN."""
        for path, layer in self.layers.items():
            _put(graph_module, path, layer)
        for target in self.read_before - targets_of(graph_module.graph):
            if not any(f"{target}.".startswith(f"{path}.") for path in self.layers):
                _remove(graph_module, target)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Every name that the graph reads is there."""
        graph_module.graph.lint()


def regions_inside(graph: fx.Graph, regions: Mapping[str, Ends]) -> set[str]:
    """The names of all nodes of the regions, with those that only look at one and return nothing,
    as an assertion of its shape."""
    named, flow = {node.name: node for node in graph.nodes}, flow_of(graph)
    found: set[fx.Node] = set()
    for x, output in (ends for several in regions.values() for ends in several):
        inside = between(flow, named[x], named[output])
        readers = {reader for node in inside - {named[output]} for reader in node.users} - inside
        found |= inside | {node for node in readers if node.op != "output" and not node.users}
    return {node.name for node in found}


def targets_of(graph: fx.Graph) -> set[str]:
    """The modules, parameters and buffers that the graph reads, by name."""
    return {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}


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
