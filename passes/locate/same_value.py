"""Equal subexpressions: a model that calls its norm twice gives its linear maps one input.

`torch.fx.passes.dialect.common.cse_pass` merges those of functional graphs. A recorded graph has
writes and random draws, and its nodes are known by calls and blocks, so here none is replaced: two
nodes are compared where it matters.
"""

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from upcycle.capture.recorder import op_name
from upcycle.passes.locate import operations
from upcycle.passes.locate.hidden_tensor import dropout_of
from upcycle.pointwise import BUILT_IN

# Operations whose result follows from what they are given. A write has `writes` in its meta.
PURE = frozenset(
    {"linear", "matmul", "glu", "dropout", "getitem_of", *BUILT_IN, *operations.TRUTH}
    | operations.LAYOUT
    | operations.JOINS
    | operations.CASTS
    | operations.FILLS
    | operations.SCALING_MIXERS
    | operations.NONLINEAR_MIXERS
    | operations.AFFINE
)


def same_value(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes hold the same numbers in every run, as far as the graph shows it.

    Every node is a value of its own: a tensor that was written to is another node afterwards.
    """
    known: dict[tuple[fx.Node, fx.Node], bool] = {}

    def equal(a: Any, b: Any) -> bool:
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return type(a) is type(b) and bool(a == b)
        if a is b:
            return True
        if (a, b) not in known:
            known[a, b] = _alike(a, b) and _all_equal(a, b)
        return known[a, b]

    def _all_equal(a: fx.Node, b: fx.Node) -> bool:
        given, shape = pytree.tree_flatten((a.args, a.kwargs))
        other_given, other_shape = pytree.tree_flatten((b.args, b.kwargs))
        return shape == other_shape and all(map(equal, given, other_given))

    return equal(one, other)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    if a.op != "call_function" or b.op != "call_function" or a.target != b.target:
        return False
    if any(a.meta.get(key) != b.meta.get(key) for key in ("shape", "dtype", "transform")):
        return False
    name = op_name(a.target)
    is_random = name == "dropout" and any(dropout_of(node) for node in (a, b))
    return name in PURE and not is_random and "writes" not in a.meta and "writes" not in b.meta
