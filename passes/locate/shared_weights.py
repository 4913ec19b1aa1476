"""Weights that something else uses too: converting their FFN would change that, or lose it."""

from torch import fx, nn

from upcycle.capture.recorder import op_name
from upcycle.ir.ffn import FFN, Located, Miss
from upcycle.passes.locate.linear import parameter_of


def read_elsewhere(
    graph: fx.Graph, ffn: FFN, maps: set[fx.Node], live: set[fx.Node]
) -> tuple[fx.Node, str] | None:
    """Where and why to refuse `ffn`: a call outside its linear maps reads one of its weights.

    `maps` are its linear maps, at every place where the model applies it, and `live` the nodes that
    the output depends on.
    """
    weights = {p.weight for p in (*ffn.expansions, ffn.contraction)}
    for node in graph.nodes:
        found = parameter_of(node)
        if found is None or found.name not in weights:
            continue
        for user in node.users:
            if user in live and user not in maps and parameter_of(user) is None:
                where = user.meta.get("path") or "the model itself"
                return user, (
                    f"its weight `{found.name}` is also read by `{op_name(user.target)}` in "
                    f"`{where}`: untie them first"
                )
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
        if tied is None:
            ffns.append(ffn)
            continue
        others = [name for name in tied if name not in ffn.parameters] or tied[1:]
        misses.append(
            Miss(ffn.path, f"its weights are shared with `{others[0]}`: untie them first")
        )
    return Located(tuple(ffns), tuple(misses))
