"""Locate: find every dense FFN of a captured program, and say why the near misses are none.

Each linear map is tried as a contraction: `demand.trace` walks back from its input to the
expansions. No name of a class or of a module is looked at.
"""

from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from upcycle.capture import ExampleInputs, Program, capture, op_name
from upcycle.inputs import find_example
from upcycle.ffn import FFN, Kind, Located, Miss, Placement, Projection
from upcycle.passes.activations import recognise, swapped
from upcycle.passes.demand import MIXERS, Demand, NotPointwise, trace
from upcycle.passes.linear import LinearMap, linear_map
from upcycle.pointwise import Pointwise

# Operations of a program that is linear in each expansion: a region with only these is no FFN.
_LINEAR_OPS = {"add", "sub", "neg", "cast"}
EXPERT_OPS = {"grouped_mm"}  # matrices chosen per token
_TRAILING = {"dropout", "view", "reshape", "contiguous", "clone"}


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
    return Located(_with_replays(program, kept), tuple(_miss_replays(program, told)))


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
    if any(_crosses_blocks(program, ffn) for ffn in located.ffns):
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


def _crosses_blocks(program: Program, ffn: FFN) -> bool:
    """Whether part of the FFN, and not all of it, lies in a block that stands for others."""
    paths = [p.module for p in (*ffn.expansions, ffn.contraction)]
    return any(
        0 < sum(_inside(path, block) for path in paths) < len(paths)
        for template, siblings in program.replays.items()
        for block in (template, *siblings, *_earlier_sibling(template))
    )


def _earlier_sibling(template: str) -> list[str]:
    head, _, index = template.rpartition(".")
    return [f"{head}.{int(index) - 1}".lstrip(".")] if index.isdigit() and int(index) else []


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


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
    _check_one_input(demand, contraction)
    _check_no_escape(demand, contraction, live)
    expansions = [e.linear for e in demand.expansions]
    pointwise = Pointwise(len(expansions), tuple(demand.steps))
    if not _is_nonlinear(pointwise):
        raise NotPointwise("there is no nonlinearity between the linear maps", contraction.node)
    projections = [_projection(demand, i) for i in range(len(expansions))]
    named = recognise(pointwise)
    if named.name == "custom" and named.arity == 2:
        other = recognise(swapped(pointwise))
        if other.name != "custom":
            named, projections = other, projections[::-1]
    d_model = expansions[0].x.meta["shape"][expansions[0].axis]
    d_ff = contraction.x.meta["shape"][contraction.axis]
    d_out = contraction.node.meta["shape"][contraction.axis]
    owner = _common_path([p.module for p in projections] + [contraction.node.meta["path"]])
    output, bias = _output(contraction)
    end, dropout = _trailing_dropout(output)
    down = Projection(
        contraction.node.meta["path"], contraction.weight, bias, contraction.transposed, (0, d_out, 1)
    )
    ffn = FFN(
        path=owner,
        kind=_kind(d_model, d_ff, d_out),
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
    placement = _placement(program, ffn, expansions[0].x, {output, end})
    if placement == "module":
        return replace(ffn, placement=placement, output_dropout=dropout)
    _check_leaf_modules(program, ffn, [*(e.node for e in expansions), output])
    return replace(ffn, placement=placement)


def _check_one_input(demand: Demand, contraction: LinearMap) -> None:
    first = demand.expansions[0]
    source = _through_views(first.linear.x)
    if any(_through_views(e.linear.x) is not source for e in demand.expansions):
        raise NotPointwise(
            "its linear maps read different inputs (a low-rank adapter? merge it into the base "
            "weight first)",
            contraction.node,
        )
    order = torch.arange(len(first.positions))
    axes = {e.linear.axis for e in demand.expansions} | {contraction.axis}
    if len(axes) > 1 or any(not torch.equal(e.positions, order) for e in demand.expansions):
        raise NotPointwise("positions are reordered before the contraction", contraction.node)


def _check_no_escape(demand: Demand, contraction: LinearMap, live: set[fx.Node]) -> None:
    region = demand.visited | {contraction.node}
    for node in demand.visited:
        for user in node.users:
            if user in live and user not in region:
                raise NotPointwise(
                    f"its hidden tensor is also read by `{op_name(user.target)}` in "
                    f"`{user.meta.get('path', '') or 'the output of the model'}`",
                    contraction.node,
                )


def _is_nonlinear(program: Pointwise) -> bool:
    def constant(args: tuple[object, ...]) -> bool:
        return sum(isinstance(a, str) and a[0] in "zt" for a in args) < 2

    return any(
        op not in _LINEAR_OPS and not (op in {"mul", "div"} and constant(args))
        for op, args, _ in program.steps
    )


def _projection(demand: Demand, i: int) -> Projection:
    expansion = demand.expansions[i]
    rows, linear = expansion.rows, expansion.linear
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    start = int(rows[0])
    if step < 1 or not torch.equal(rows, torch.arange(len(rows)) * step + start):
        raise NotPointwise("its neurons are not stored in one regular order", linear.node)
    bias = linear.bias or demand.biases.get(i)
    stop = start + step * (len(rows) - 1) + 1
    return Projection(
        linear.node.meta["path"], linear.weight, bias, linear.transposed, (start, stop, step)
    )


def _output(contraction: LinearMap) -> tuple[fx.Node, str | None]:
    """The node that holds the FFN's output, and its bias: a bias may be added in a call of its own."""
    node = contraction.node
    users = list(node.users)
    if contraction.bias is None and len(users) == 1 and op_name(users[0].target) == "add":
        others = [a for a in users[0].args if isinstance(a, fx.Node) and a is not node]
        width = node.meta["shape"][contraction.axis]
        if len(others) == 1 and others[0].op == "get_attr" and others[0].meta["shape"] == (width,):
            return users[0], others[0].meta["parameter"]
    return node, contraction.bias


def _trailing_dropout(node: fx.Node) -> tuple[fx.Node, float]:
    """Follow `node` through views and dropout that only it feeds."""
    probability = 0.0
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function" or op_name(user.target) not in _TRAILING:
            break
        if op_name(user.target) == "dropout":
            probability = float(user.kwargs.get("p", user.args[1] if len(user.args) > 1 else 0.5))  # type: ignore[arg-type]
        node = user
    return node, probability


def _placement(program: Program, ffn: FFN, x: fx.Node, outputs: set[fx.Node]) -> Placement:
    """``module`` if a module computes exactly this FFN; else how its linear maps are spread."""
    for call in program.calls.get(ffn.path, []):
        same_in = {_through_views(n) for n in call.inputs} == {_through_views(x)}
        ends = {_through_views(n) for n in outputs}
        same_out = len(call.outputs) == 1 and _through_views(call.outputs[0]) in ends
        if ffn.path and same_in and same_out:
            return "module"
    depth = ffn.path.count(".") + 1 if ffn.path else 0
    paths = [p.module for p in (*ffn.expansions, ffn.contraction)]
    return "inline" if all(path.count(".") <= depth for path in paths) else "siblings"


def _check_leaf_modules(program: Program, ffn: FFN, nodes: list[fx.Node]) -> None:
    """Without a module of its own, each linear map must be a module, to put another in its place."""
    for node in nodes:
        path = node.meta["path"]
        calls = program.calls.get(path, [])
        if not any(_through_views(node) in map(_through_views, call.outputs) for call in calls):
            raise NotPointwise(
                f"its weights are raw parameters that `{path or 'the model'}` applies among other "
                "things: move the FFN into a module of its own",
                node,
            )
    if len({p.module for p in ffn.expansions}) < len({p.weight for p in ffn.expansions}):
        raise NotPointwise("one module applies several of its linear maps", nodes[0])


def _through_views(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of."""
    while node.op == "call_function" and op_name(node.target) in _TRAILING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["shape"][-1:] != node.meta["shape"][-1:]:
            break
        node = source
    return node


def _kind(d_model: int, d_ff: int, d_out: int) -> Kind:
    if d_out != d_model and d_ff <= d_model:
        return "head"
    return "bottleneck" if d_ff < min(d_model, d_out) else "ffn"


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
    return demand is not None and _is_nonlinear(
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


def _with_replays(program: Program, found: list[FFN]) -> tuple[FFN, ...]:
    """Add a copy of each FFN for every sibling block that repeats the one it was found in."""
    out: list[FFN] = []
    for ffn in found:
        out.append(ffn)
        for template, siblings in program.replays.items():
            if _inside(ffn.path, template):
                for path in dict.fromkeys(siblings):
                    if path != template:
                        out.append(_renamed(ffn, template, path))
    unique = {ffn.parameters: ffn for ffn in reversed(out)}
    return tuple(sorted(unique.values(), key=_running_order(program, found)))


def _running_order(program: Program, found: list[FFN]):  # type: ignore[no-untyped-def]
    order = {path: i for i, path in enumerate(program.calls)}

    def key(ffn: FFN) -> tuple[int, ...]:
        parts = ffn.contraction.module.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return tuple(order[p] for p in prefixes if p in order)

    return key


def _renamed(ffn: FFN, old: str, new: str) -> FFN:
    def path(name: str) -> str:
        return new + name[len(old) :]

    def projection(p: Projection) -> Projection:
        bias = path(p.bias) if p.bias else None
        return replace(p, module=path(p.module), weight=path(p.weight), bias=bias)

    return replace(
        ffn,
        path=path(ffn.path),
        expansions=tuple(projection(p) for p in ffn.expansions),
        contraction=projection(ffn.contraction),
    )


def _miss_replays(program: Program, misses: list[Miss]) -> list[Miss]:
    out = list(misses)
    for miss in misses:
        for template, siblings in program.replays.items():
            if _inside(miss.path, template):
                out += [Miss(s + miss.path[len(template) :], miss.reason) for s in siblings]
    return list(dict.fromkeys(out))


def _common_path(paths: list[str]) -> str:
    """The innermost module that contains all of `paths`, which are modules within it."""
    split = [p.split(".") for p in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)

