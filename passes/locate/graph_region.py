"""Where in a graph that was recorded an FFN lies: the nodes that it begins and ends with."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from upcycle.capture.recorder import Program, op_name
from upcycle.ir.ffn import FFN, Projection
from upcycle.passes.locate.hidden_tensor import data_of
from upcycle.passes.locate.layout import is_stored
from upcycle.passes.locate.place import Use
from upcycle.passes.locate.region import VIEWS, common_path

if TYPE_CHECKING:
    from upcycle.graphs.closed_region import Flow

_VIEWS = VIEWS - {"dropout"}


def in_graph(program: Program, uses: Sequence[Use], live: Set[fx.Node]) -> FFN | None:
    """The FFN that is applied at `uses` as regions of a graph, or None if one of them is none.

    A view before it, or after, may belong to the region, so that what comes out has the shape of
    what goes in but for its features. What the walk has not looked at is asked of the whole region:
    nothing in it is read from outside, and nothing is written across its border.
    """
    ffn = uses[0].ffn
    if ffn.shared or not program.is_graph:
        return None
    from upcycle.graphs.closed_region import flow_of  # networkx is slow to import

    flow = flow_of(program.graph)
    regions = [_ends(use, flow, live) for use in uses]
    if not all(regions):
        return None
    expansions = tuple(_named(p) for p in ffn.expansions)
    contraction = _named(ffn.contraction)
    path = common_path([p.module for p in (*expansions, contraction)])
    return replace(
        ffn,
        path=path,
        placement="region",
        expansions=expansions,
        contraction=contraction,
        regions=tuple(ends for ends in regions if ends is not None),
        holds_alone=bool(path) and _holds_alone(program, path, uses),
    )


def _ends(use: Use, flow: "Flow", live: Set[fx.Node]) -> tuple[str, str] | None:
    from upcycle.graphs.closed_region import leaks

    for output in reversed(list(_onwards(use.output))):
        for x in reversed(list(_backwards(use.x))):
            shape = list(x.meta["shape"])
            shape[use.ffn.axis] = use.ffn.d_out
            before, after = x.meta.get("nodes", ()), output.meta.get("nodes", ())
            fits = tuple(shape) == output.meta["shape"] and before and after
            # Where it reads what is not x, that is the same value, as the walk has found.
            if fits and all(leak.kind == "reads" for leak in leaks(flow, x, output, live)):
                return before[0], after[0]
    return None


def _backwards(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what it is a view of."""
    yield node
    while node.op == "call_function" and op_name(node.target) in _VIEWS:
        node = data_of(node)
        yield node


def _onwards(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and the views of it that alone read it."""
    yield node
    while len(node.users) == 1 and op_name(next(iter(node.users)).target) in _VIEWS:
        node = next(iter(node.users))
        yield node


def _named(projection: Projection) -> Projection:
    """With the place of its weight, where the graph does not say which module it comes from."""
    if projection.module:
        return projection
    path, _, name = projection.weight.rpartition(".")
    return replace(projection, module=path or name)


def _holds_alone(program: Program, path: str, uses: Sequence[Use]) -> bool:
    """Whether all that the graph does in the module at `path` is the FFN."""
    own: set[fx.Node] = set()
    for use in uses:
        own |= {*use.nodes, *use.hidden.visited, *_backwards(use.x), *_onwards(use.output)}
    return all(
        node in own or op_name(node.target) in VIEWS or is_stored(node)
        for node in program.graph.nodes
        if node.op == "call_function" and f"{node.meta['path']}.".startswith(f"{path}.")
    )
