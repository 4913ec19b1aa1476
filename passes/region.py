"""The region around a contraction: what must hold for it to be an FFN, and how it is placed."""

import torch
from torch import fx

from upcycle.capture import Program, op_name
from upcycle.ffn import FFN, Kind, Placement, Projection
from upcycle.passes.demand import Demand, NotPointwise
from upcycle.passes.linear import LinearMap
from upcycle.pointwise import Pointwise

# Operations of a program that is linear in each expansion: a region with only these is no FFN.
_LINEAR_OPS = {"add", "sub", "neg", "cast"}
_TRAILING = {"dropout", "view", "reshape", "contiguous", "clone"}


def check_one_input(demand: Demand, contraction: LinearMap) -> None:
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


def check_no_escape(demand: Demand, contraction: LinearMap, live: set[fx.Node]) -> None:
    region = demand.visited | {contraction.node}
    for node in demand.visited:
        for user in node.users:
            if user in live and user not in region:
                raise NotPointwise(
                    f"its hidden tensor is also read by `{op_name(user.target)}` in "
                    f"`{user.meta.get('path', '') or 'the output of the model'}`",
                    contraction.node,
                )


def is_nonlinear(program: Pointwise) -> bool:
    def constant(args: tuple[object, ...]) -> bool:
        return sum(isinstance(a, str) and a[0] in "zt" for a in args) < 2

    return any(
        op not in _LINEAR_OPS and not (op in {"mul", "div"} and constant(args))
        for op, args, _ in program.steps
    )


def projection_of(demand: Demand, i: int) -> Projection:
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


def output_of(contraction: LinearMap) -> tuple[fx.Node, str | None]:
    """The node that holds the FFN's output, and its bias: a bias may be added in a call of its own."""
    node = contraction.node
    users = list(node.users)
    if contraction.bias is None and len(users) == 1 and op_name(users[0].target) == "add":
        others = [a for a in users[0].args if isinstance(a, fx.Node) and a is not node]
        width = node.meta["shape"][contraction.axis]
        if len(others) == 1 and others[0].op == "get_attr" and others[0].meta["shape"] == (width,):
            return users[0], others[0].meta["parameter"]
    return node, contraction.bias


def trailing_dropout(node: fx.Node) -> tuple[fx.Node, float]:
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


def placement_of(program: Program, ffn: FFN, x: fx.Node, outputs: set[fx.Node]) -> Placement:
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


def check_leaf_modules(program: Program, ffn: FFN, nodes: list[fx.Node]) -> None:
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


def kind_of(d_model: int, d_ff: int, d_out: int) -> Kind:
    if d_out != d_model and d_ff <= d_model:
        return "head"
    return "bottleneck" if d_ff < min(d_model, d_out) else "ffn"


def common_path(paths: list[str]) -> str:
    """The innermost module that contains all of `paths`, which are modules within it."""
    split = [p.split(".") for p in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
