"""Locate: find every dense FFN of a captured program, and say why the near misses are none.

Each linear map is tried as a contraction: `demand.trace` walks back from its input to the
expansions. No name of a class or of a module is looked at.
"""

from dataclasses import replace

from torch import fx, nn

from upcycle.capture import ExampleInputs, Program, capture, op_name
from upcycle.ffn import FFN, Located, Miss, Projection
from upcycle.inputs import find_example
from upcycle.passes.activations import recognise, swapped
from upcycle.passes.demand import MIXERS, NotPointwise, trace
from upcycle.passes.linear import LinearMap, linear_map
from upcycle.passes.region import (
    check_leaf_modules,
    check_no_escape,
    check_one_input,
    common_path,
    is_nonlinear,
    kind_of,
    output_of,
    placement_of,
    projection_of,
    trailing_dropout,
)
from upcycle.passes.replay import crosses_blocks, with_replayed_misses, with_replays
from upcycle.pointwise import Pointwise

EXPERT_OPS = {"grouped_mm"}  # matrices chosen per token


def locate(program: Program) -> Located:
    """All FFNs and near misses, in the order in which the model runs them.

    An FFN whose weights are used at several places of the model is reported once.
    """
    found: list[FFN] = []
    misses: list[Miss] = []
    seen: set[tuple[str, ...]] = set()
    live = _live_nodes(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and op_name(node.target) in EXPERT_OPS:
            misses.append(Miss(node.meta["path"], "it is already a mixture of experts"))
        contraction = linear_map(node) if node in live else None
        if contraction is None:
            continue
        try:
            ffn = _ffn(program, contraction, live)
        except NotPointwise as reason:
            if _looks_like_ffn(contraction, reason):
                misses.append(Miss(contraction.node.meta["path"], str(reason)))
            continue
        if ffn.parameters not in seen:
            seen.add(ffn.parameters)
            found.append(ffn)
    kept = _drop_overlapping(found, misses)
    used = {p.module for ffn in kept for p in (*ffn.expansions, ffn.contraction)}
    told = [miss for miss in misses if miss.path not in used]
    return Located(with_replays(program, kept), tuple(with_replayed_misses(program, told)))


def locate_in(model: nn.Module, example: ExampleInputs | None = None) -> Located:
    """Capture `model` on `example` (or on guessed inputs) and locate its FFNs.

    A model whose FFNs reach from one block into the next is captured again with every block.
    """

    def captured(repeat_blocks: bool) -> Program:
        if example is None:
            return find_example(model, repeat_blocks=repeat_blocks)[1]
        return capture(model, example, repeat_blocks=repeat_blocks)

    program = captured(repeat_blocks=True)
    located = locate(program)
    if any(crosses_blocks(program, ffn) for ffn in located.ffns):
        located = locate(captured(repeat_blocks=False))
    return _without_tied(model, located)


def _without_tied(model: nn.Module, located: Located) -> Located:
    """Refuse FFNs whose weights something else uses too: converting them would change it."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    aliases = {name: group for group in names.values() for name in group}
    ffns, misses = [], list(located.misses)
    for ffn in located.ffns:
        own = set(ffn.parameters)
        others = sorted(set().union(*(aliases[name] for name in own)) - own)
        if others or len(own & set(aliases)) > len({id(aliases[name]) for name in own}):
            shared = others[0] if others else "itself (the contraction is the transposed expansion)"
            misses.append(Miss(ffn.path, f"its weights are shared with {shared}: untie them first"))
        else:
            ffns.append(ffn)
    return Located(tuple(ffns), tuple(misses))


def _live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output, or an assignment in place, depends on."""
    live: set[fx.Node] = set()
    todo = [n for n in graph.nodes if n.op == "output" or op_name(n.target) == "setitem"]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(node.all_input_nodes)
    return live


def _ffn(program: Program, contraction: LinearMap, live: set[fx.Node]) -> FFN:
    demand = trace(contraction.x, contraction.axis)
    check_one_input(demand, contraction)
    check_no_escape(demand, contraction, live)
    expansions = [e.linear for e in demand.expansions]
    pointwise = Pointwise(len(expansions), tuple(demand.steps))
    if not is_nonlinear(pointwise):
        raise NotPointwise("there is no nonlinearity between the linear maps", contraction.node)
    projections = [projection_of(demand, i) for i in range(len(expansions))]
    named = recognise(pointwise)
    if named.name == "custom" and named.arity == 2:
        other = recognise(swapped(pointwise))
        if other.name != "custom":
            named, projections = other, projections[::-1]
    d_model = expansions[0].x.meta["shape"][expansions[0].axis]
    d_ff = contraction.x.meta["shape"][contraction.axis]
    d_out = contraction.node.meta["shape"][contraction.axis]
    owner = common_path([p.module for p in projections] + [contraction.node.meta["path"]])
    output, bias = output_of(contraction)
    end, dropout = trailing_dropout(output)
    down = Projection(
        contraction.node.meta["path"],
        contraction.weight,
        bias,
        contraction.transposed,
        (0, d_out, 1),
    )
    ffn = FFN(
        path=owner,
        kind=kind_of(d_model, d_ff, d_out),
        placement="inline",
        expansions=tuple(projections),
        contraction=down,
        pointwise=named,
        d_model=d_model,
        d_ff=d_ff,
        d_out=d_out,
        axis=contraction.axis,
        hidden_dropout=demand.dropout,
    )
    placement = placement_of(program, ffn, expansions[0].x, {output, end})
    if placement == "module":
        return replace(ffn, placement=placement, output_dropout=dropout)
    check_leaf_modules(program, ffn, [*(e.node for e in expansions), output])
    return replace(ffn, placement=placement)


def _looks_like_ffn(contraction: LinearMap, reason: NotPointwise) -> bool:
    """Whether a refusal is worth telling: an activation of a linear map comes before it."""
    node: fx.Node | None = reason.node
    if str(reason).startswith(("its", "a learned", "positions", "one module")):
        return True
    if node is None or node.op != "call_function" or op_name(node.target) not in MIXERS:
        return False
    source = node.args[0]
    try:
        demand = trace(source, -1) if isinstance(source, fx.Node) else None
    except NotPointwise:
        return False
    return demand is not None and is_nonlinear(
        Pointwise(len(demand.expansions), tuple(demand.steps))
    )


def _drop_overlapping(found: list[FFN], misses: list[Miss]) -> list[FFN]:
    """Of FFNs that share a linear map keep the one with more neurons."""
    kept: list[FFN] = []
    for ffn in sorted(found, key=lambda f: -f.d_ff):
        rival = next((k for k in kept if set(k.parameters) & set(ffn.parameters)), None)
        if rival is None:
            kept.append(ffn)
        else:
            misses.append(
                Miss(ffn.contraction.module, f"it shares a weight with the FFN `{rival.path}`")
            )
    return [ffn for ffn in found if ffn in kept]
