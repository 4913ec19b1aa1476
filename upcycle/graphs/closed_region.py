"""What lies between two nodes of a graph, and what else than these two ties it to the rest.

These are questions to networkx, about the `flow_of` a graph. A region without a leak can be
replaced as a whole, by anything that makes the same output of the same x.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import networkx as nx
from torch import fx

if TYPE_CHECKING:
    Flow = nx.DiGraph[fx.Node]


@dataclass(frozen=True)
class Leak:
    """What ties a region to the rest of the graph besides its ends, x and the output.

    Attributes:
        kind: `inside` ``reads`` data that are not x; or it ``is read``, and is not the output; or
            it ``writes`` to memory that nothing made from x. Or `inside` is what the region reads,
            such as x, and ``is written`` to before the output is made.
        inside, outside: the two nodes.
    """

    kind: Literal["reads", "is read", "writes", "is written"]
    inside: fx.Node
    outside: fx.Node


def flow_of(graph: fx.Graph) -> "Flow":
    """An edge leads from each node to each that reads it; a copy, in the order of `graph`."""
    return nx.DiGraph({node: list(node.users) for node in graph.nodes})


def between(flow: "Flow", x: fx.Node, output: fx.Node) -> frozenset[fx.Node]:
    """The nodes on the ways from `x`, which is none of them, to `output`, which is one, if any."""
    near = flow.subgraph(node for node in flow if x <= node <= output)  # in the graph's order
    if x not in near:
        return frozenset()
    return frozenset(nx.descendants(near, x) & (nx.ancestors(near, output) | {output}))


def leaks(flow: "Flow", x: fx.Node, output: fx.Node, live: Set[fx.Node]) -> list[Leak]:
    """All leaks of the region from `x` to `output`, in the order of the graph.

    Without one every way into the region goes through `x`, or comes from parameters and constants
    alone; every way out of it, to a `live` node or to a write, goes through `output`; and nothing
    is changed in place across its border. So x dominates it, and the output postdominates it.
    """
    region, sources, found = between(flow, x, output), {x}, []

    def writes(node: fx.Node) -> list[fx.Node]:
        """What `node` writes to, but for what was made of x: memory of the region's own."""
        return [n for n in node.meta.get("writes", ()) if n is x or not nx.has_path(flow, x, n)]

    def matters(reader: fx.Node) -> bool:
        return reader in live or any(map(writes, [reader, *nx.descendants(flow, reader)]))

    for node, source in nx.edge_boundary(flow.reverse(copy=False), region):
        sources.add(source)
        if source is not x and _is_data(flow, source):
            found.append(Leak("reads", node, source))
    for node, reader in nx.edge_boundary(flow, region):
        if node is not output and matters(reader):
            found.append(Leak("is read", node, reader))
    for node in region:
        found += [Leak("writes", node, old) for old in writes(node)]
    for writer in (n for n in flow if x < n < output and n not in region):
        written = sources.intersection(writer.meta.get("writes", ()))
        found += [Leak("is written", old, writer) for old in written]
    return sorted(found, key=lambda leak: (leak.outside, leak.inside))


def _is_data(flow: "Flow", node: fx.Node) -> bool:
    """Whether `node` depends on an input of the model."""
    return any(n.op == "placeholder" for n in nx.ancestors(flow, node) | {node})
