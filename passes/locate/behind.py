"""What nodes of a captured graph are computed from.

By hand: networkx needs a copy of the graph, with which it takes six times as long, and its import
takes three times as long as locating the FFNs of Llama-3-70B.
"""

from collections.abc import Iterable

from torch import fx

from upcycle.capture.recorder import op_name


def behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The `nodes`, and all that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output, or an assignment in place, depends on."""
    return behind(n for n in graph.nodes if n.op == "output" or op_name(n.target) == "setitem")
