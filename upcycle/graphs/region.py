"""A region of a graph of torch.fx: what lies between two of its nodes."""

import networkx as nx
from torch import fx


def digraph(graph: fx.Graph) -> "nx.DiGraph[fx.Node]":
    """The nodes of `graph`, with an edge to each that reads one."""
    found: nx.DiGraph[fx.Node] = nx.DiGraph()
    found.add_nodes_from(graph.nodes)
    found.add_edges_from((read, node) for node in graph.nodes for read in node.all_input_nodes)
    return found


def between(flow: "nx.DiGraph[fx.Node]", x: fx.Node, output: fx.Node) -> set[fx.Node]:
    """The nodes that depend on `x` and that `output` depends on, with `output`.

    So are those that only look at one of them and return nothing, as an assertion of its shape.
    """
    inside = nx.descendants(flow, x) & (nx.ancestors(flow, output) | {output})
    readers = {reader for node in inside - {output} for reader in flow[node]} - inside
    return inside | {node for node in readers if node.op != "output" and not flow[node]}
