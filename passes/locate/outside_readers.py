"""Does anything outside an FFN read its hidden tensor, or its weights?

Converting the FFN would change what reads its weights, or lose them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx, nn

from upcycle.capture.recorder import op_name
from upcycle.ir.ffn import FFN, Located, Miss
from upcycle.passes.locate.hidden_tensor import HiddenTensor, NearMissError
from upcycle.passes.locate.layout import is_layout, run_layout
from upcycle.passes.locate.linear import LinearMap, linear_map, parameter_of
from upcycle.passes.locate.operations import CASTS, LAYOUT, SHAPED_LIKE

_READS_TYPE_ALONE = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}


def check_outside_readers(hidden: HiddenTensor, contraction: LinearMap, live: set[fx.Node]) -> bool:
    """Refuse an FFN if something outside reads an element of its hidden tensor.

    A linear map may have outputs that are no neurons of this FFN (a fused projection gives the
    queries, too): those may go anywhere.

    Returns:
        Whether some do.
    """
    inside = hidden.visited | {contraction.node}
    readers: list[tuple[fx.Node, bool]] = []
    for node in hidden.visited:
        if op_name(node.target) not in LAYOUT | {"getitem_of"}:  # these are met on the way
            readers += _readers(node, hidden.taken_of(node), inside, live)
    reader = next((user for user, of_neurons in readers if of_neurons), None)
    if reader is not None:
        reason = f"its hidden tensor is also {_described(reader)}"
        if _is_adapter(reader, contraction):
            reason = "a low-rank adapter lies on its contraction: merge it first"
        where = contraction.node if reader.op == "output" else reader
        raise NearMissError(reason, where)
    return bool(readers)


def _readers(
    node: fx.Node, hidden: Any, inside: set[fx.Node], live: set[fx.Node]
) -> Iterator[tuple[fx.Node, bool]]:
    """Who reads `node` outside, and whether it reads neurons: elements where `hidden` is true."""
    for user in node.users:
        name = op_name(user.target)
        shape_alone = name in SHAPED_LIKE and user.args[0] is not node
        if user not in live or name in _READS_TYPE_ALONE or shape_alone:
            continue
        if name == "getitem_of":
            yield from _readers(user, hidden[user.args[1]], inside, live)
        elif is_layout(user):
            yield from _readers(user, run_layout(user, hidden), inside, live)
        elif user not in inside:
            yield user, bool(hidden.any())


def _is_adapter(reader: fx.Node, contraction: LinearMap) -> bool:
    """Whether `reader` begins a pair of narrow linear maps beside the contraction."""
    down = _next_linear(reader)
    up = _next_linear(next(iter(down.node.users), None)) if down else None
    if down is None or up is None:
        return False
    rank = down.node.meta["shape"][down.axis]
    if up.node.meta["shape"] != contraction.node.meta["shape"]:
        return False
    widths = (down.x.meta["shape"][down.axis], up.node.meta["shape"][up.axis])
    return bool(rank < min(widths))


def _next_linear(node: fx.Node | None) -> LinearMap | None:
    """The linear map at `node`, or after the dropouts and casts that begin there."""
    while node is not None and linear_map(node) is None:
        if op_name(node.target) not in CASTS | LAYOUT | {"dropout"} or len(node.users) != 1:
            return None
        node = next(iter(node.users))
    return None if node is None else linear_map(node)


def _described(user: fx.Node) -> str:
    if user.op == "output":
        return "an output of the model"
    where = user.meta.get("path")
    return f"read by `{op_name(user.target)}` in " + (f"`{where}`" if where else "the model itself")


def reads_of_parameters(graph: fx.Graph, live: set[fx.Node]) -> list[tuple[str, fx.Node]]:
    """Each parameter and each of its `live` readers, past its views, in the order of the graph."""
    stored = [(found.name, node) for node in graph.nodes if (found := parameter_of(node))]
    return [
        (name, user)
        for name, node in stored
        for user in node.users
        if user in live and parameter_of(user) is None
    ]


def read_elsewhere(
    reads: Iterable[tuple[str, fx.Node]], ffn: FFN, maps: set[fx.Node]
) -> tuple[fx.Node, str] | None:
    """Where and why to refuse `ffn`: a call outside its linear maps reads one of its weights.

    `reads` are those of all parameters, and `maps` its linear maps, at every place where the model
    applies it.
    """
    weights = {p.weight for p in (*ffn.expansions, ffn.contraction)}
    for name, user in reads:
        if name in weights and user not in maps:
            return user, f"its weight `{name}` is also {_described(user)}: untie them first"
    return None


def without_tied(model: nn.Module, located: Located) -> Located:
    """Refuse FFNs with a parameter that another module, or another name of it, holds too.

    A module that is registered at several places holds its parameters once: it is converted once
    and put at each of the places.
    """
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ffns, misses = [], list(located.misses)
    for ffn in located.ffns:
        own = [holders[id(parameters[name])] for name in ffn.parameters]
        tied = next((names for names in own if len(names) > 1), None)
        if tied is None or ffn.placement == "region":  # a graph shows all that reads them
            ffns.append(ffn)
            continue
        others = [name for name in tied if name not in ffn.parameters] or tied[1:]
        misses.append(
            Miss(ffn.path, f"its weights are shared with `{others[0]}`: untie them first")
        )
    return Located(tuple(ffns), tuple(misses))
