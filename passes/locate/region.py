"""The region around a contraction: what must hold for it to be an FFN."""

from itertools import takewhile

import torch
from torch import fx

from upcycle.capture.recorder import op_name
from upcycle.ir.ffn import Projection
from upcycle.passes.locate.hidden_tensor import HiddenTensor, NearMissError, data_of, dropout_of
from upcycle.passes.locate.linear import LinearMap, linear_map
from upcycle.passes.locate.operations import LINEAR
from upcycle.passes.locate.refused_operations import why_not_linear
from upcycle.passes.locate.same_value import same_value
from upcycle.pointwise import Pointwise
from upcycle.recipe.schema import FFNKind

VIEWS = {"dropout", "view", "reshape", "contiguous", "clone"}


def check_one_input(hidden: HiddenTensor, contraction: LinearMap) -> None:
    """Every expansion must read the same x, in the order of the contraction's positions."""
    inputs = [through_views(e.linear.x, past_draws=False) for e in hidden.expansions]
    source = inputs[0]
    other = next((x for x in inputs if not same_value(x, source)), None)
    if other is not None:
        names = " and ".join(f"`{node.name}`" for node in (source, other))
        reason = f"its linear maps read different inputs, {names}"
        if linear_map(source) or linear_map(other):
            reason += " (a low-rank adapter on an expansion? merge it into the base weight first)"
        raise NearMissError(reason, contraction.node)
    order = torch.arange(len(hidden.expansions[0].positions))
    axes = {e.linear.axis for e in hidden.expansions} | {contraction.axis}
    if len(axes) > 1 or any(not torch.equal(e.positions, order) for e in hidden.expansions):
        raise NearMissError("positions are reordered before the contraction", contraction.node)


def check_own_weights(expansions: list[LinearMap], contraction: LinearMap) -> None:
    """Each linear map must have a stored weight, and the contraction one of its own."""
    if contraction.node.meta["dtype"].is_complex:
        raise NearMissError("its weights are complex numbers", contraction.node)
    if contraction.grouped:
        raise NearMissError(why_not_linear(contraction.node), contraction.node)
    nameless = [linear for linear in (*expansions, contraction) if not linear.weight]
    packing = next((linear.packing for linear in nameless if linear.packing), "")
    if packing:
        raise NearMissError(
            f"its weights are quantised ({packing}): start from the model with float weights",
            contraction.node,
        )
    if nameless:
        raise NearMissError(
            "its weight or bias is computed in the forward (weight norm, dequantisation, a "
            "parametrisation, pruning): write the result into a plain parameter first",
            nameless[0].node,
        )
    if contraction.weight in {e.weight for e in expansions}:
        raise NearMissError(
            "its contraction and an expansion are one weight: untie them first", contraction.node
        )


def is_nonlinear(program: Pointwise) -> bool:
    """Whether a program is more than a sum of multiples of its arguments."""

    def by_number(args: tuple[object, ...]) -> bool:
        return sum(isinstance(a, str) and a[0] in "zt" for a in args) < 2

    return any(
        op not in LINEAR and not (op in {"mul", "div"} and by_number(args))
        for op, args, _ in program.steps
    )


def projection_of(hidden: HiddenTensor, i: int) -> Projection:
    """Expansion `i` as data; its rows must be evenly spaced."""
    expansion = hidden.expansions[i]
    rows, linear = expansion.rows, expansion.linear
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    start = int(rows[0])
    if step < 1 or not torch.equal(rows, torch.arange(len(rows)) * step + start):
        raise NearMissError("its neurons are not stored in one regular order", linear.node)
    bias = linear.bias or hidden.biases.get(i)
    stop = start + step * (len(rows) - 1) + 1
    return Projection(
        linear.node.meta["path"], linear.weight, bias, linear.transposed, (start, stop, step)
    )


def output_of(contraction: LinearMap) -> tuple[fx.Node, str | None]:
    """The node that holds the output, and its bias, which may be added in a call of its own."""
    node = contraction.node
    users = list(node.users)
    if contraction.bias is None and len(users) == 1 and op_name(users[0].target) == "add":
        others = [a for a in users[0].args if isinstance(a, fx.Node) and a is not node]
        width = node.meta["shape"][contraction.axis]
        if len(others) == 1 and others[0].op == "get_attr" and others[0].meta["shape"] == (width,):
            name = others[0].meta["parameter"]
            if name and not users[0].kwargs and contraction.axis == -1:
                return users[0], name
    return node, contraction.bias


def through_views(node: fx.Node, *, past_draws: bool = True) -> fx.Node:
    """The tensor that `node` is a view of; a dropout counts as one, if `past_draws`."""
    while node.op == "call_function" and op_name(node.target) in VIEWS:
        if not past_draws and op_name(node.target) == "dropout" and dropout_of(node):
            break
        source = data_of(node)
        if source.meta["shape"][-1:] != node.meta["shape"][-1:]:
            break
        node = source
    return node


def kind_of(d_model: int, d_ff: int, d_out: int) -> FFNKind:
    """What an FFN-shaped region is for, by its widths.

    A hidden layer that is wider than its input makes an ``ffn``, whatever comes out. Without one, a
    region of another output width is a ``head`` (a pooler with its classifier, the transform of a
    language-model head), and one that is narrower than both ends a ``bottleneck`` (an adapter,
    squeeze and excitation).
    """
    if d_out != d_model and d_ff <= d_model:
        return "head"
    return "bottleneck" if d_ff < min(d_model, d_out) else "ffn"


def common_path(paths: list[str]) -> str:
    """The innermost module that contains all of `paths`, which are modules within it."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
