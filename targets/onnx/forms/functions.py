"""The functions behind the MoE nodes, in standard ONNX operations.

Shape suffixes: T tokens, D d_model, O d_out, E experts, I expert width, G rows of an expansion.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import onnx_ir as ir

from upcycle.onnx.nodes import OPSET, Nodes
from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Form
from upcycle.targets.onnx.forms import activation as programs
from upcycle.targets.onnx.forms.choose import kernel_named
from upcycle.targets.onnx.forms.dense import dense
from upcycle.targets.onnx.forms.unrolled import Stack, grouped

MS = "com.microsoft"
OWN = "upcycle"

# The forms in standard operations.
STANDARD: Final[dict[Form, Callable[..., ir.Value]]] = {"unrolled": grouped, "dense": dense}

FUSED_ATTRIBUTES = (
    *("k", "activation_type", "normalize_routing_weights"),
    *("swiglu_fusion", "activation_alpha", "activation_beta"),
)


def _function(
    domain: str,
    name: str,
    inputs: list[ir.Value],
    output: ir.Value,
    nodes: Nodes,
    attributes: tuple[str, ...] = (),
) -> ir.Function:
    graph = ir.Graph(inputs, [output], nodes=nodes.nodes, opset_imports={"": OPSET}, name=name)
    undefined = [ir.Attr(a, ir.AttributeType.UNDEFINED, None) for a in attributes]
    return ir.Function(domain, name, graph=graph, attributes=undefined)


def standard(
    form: Form,
    name: str,
    pointwise: Pointwise,
    num_experts: int,
    *,
    bias: bool,
    blocks: Sequence[int] = (),
    unpack: bool = False,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Function:
    """A layer in one of the `STANDARD` forms.

    Inputs: x [T, D], weights [T, E] with zeros for the experts that a token skips, up [E, G, D],
    up bias [E, G] if `bias`, down [E, O, I]. Output [T, O]. With `blocks`, the inputs of a block of
    up and of down, both are int8, and each is followed by its scales; `unpack` is as for `matrix`.
    """
    x_TD, weights_TE, up_EGD, down_EOI = (ir.Value(name=i) for i in ("x", "weights", "up", "down"))
    up, down = Stack(up_EGD), Stack(down_EOI)
    if blocks:
        up = Stack(up_EGD, ir.Value(name="up_scale"), blocks[0], unpack)
        down = Stack(down_EOI, ir.Value(name="down_scale"), blocks[1], unpack)
    bias_EG = ir.Value(name="up_bias") if bias else None
    n = Nodes(dtype=dtype)
    out_TO = STANDARD[form](n, pointwise, num_experts, x_TD, weights_TE, up, bias_EG, down)
    places = [x_TD, weights_TE, up_EGD, up.scale, bias_EG, down_EOI, down.scale]
    inputs = [place for place in places if place is not None]
    return _function(OWN, name, inputs, out_TO, n)


def fused(
    activations: list[str], *, bias: bool, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Function:
    """What the kernel ``com.microsoft::MoE`` computes with ``normalize_routing_weights=1``.

    For runtimes without the kernel: every expert on every token, so correct and slow. A file holds
    one function of a name, so it serves every layer: any E, any k, each of `activations`.

    Inputs: x [T, D], scores [T, E], up [E, G, D], up bias [E, G] if `bias`, down [E, D, I].
    """
    x_TD, scores_TE, up_EGD, bias_EG, down_EDI = (
        ir.Value(name=i) for i in ("x", "scores", "up", "up_bias", "down")
    )
    n = Nodes(dtype=dtype)
    given_k = ir.RefAttr("value_int", "k", ir.AttributeType.INT)
    k = n("Reshape", n("Constant", value_int=given_k), n.const([1]))
    single_TE = n("Cast", scores_TE, to=ir.DataType.FLOAT.value) if n.is_half else scores_TE
    p_TE = n("Softmax", single_TE, axis=-1)
    top_TK, index_TK = n.many("TopK", p_TE, k, outputs=2, axis=-1)
    top_TK = n("Div", top_TK, n("ReduceSum", top_TK, n.const([1]), keepdims=1))
    zeros_TE = n("ConstantOfShape", n("Shape", scores_TE))
    weights_TE = n("ScatterElements", zeros_TE, index_TK, top_TK, axis=1)
    if n.is_half:
        weights_TE = n("CastLike", weights_TE, scores_TE)
    z_ETG = n("MatMul", x_TD, n("Transpose", up_EGD, perm=[0, 2, 1]))
    if bias:
        z_ETG = n("Add", z_ETG, n("Unsqueeze", bias_EG, n.const([1])))
    hidden_ETI = _choose(n, activations, z_ETG)
    y_ETD = n("MatMul", hidden_ETI, n("Transpose", down_EDI, perm=[0, 2, 1]))
    weights_ET1 = n("Unsqueeze", n("Transpose", weights_TE, perm=[1, 0]), n.const([2]))
    y_TD = n("ReduceSum", n("Mul", y_ETD, weights_ET1), n.const([0]), keepdims=0)
    inputs = [x_TD, scores_TE, up_EGD, bias_EG, down_EDI]
    return _function(MS, "MoE", inputs, y_TD, n, FUSED_ATTRIBUTES)


def _choose(n: Nodes, activations: list[str], z: ir.Value) -> ir.Value:
    """The activation that the attribute `activation_type` of the node names."""
    name, *rest = activations
    if not rest:
        return _activate(n, name, z)
    branches: dict[str, Any] = {}
    for branch, names in (("then_branch", [name]), ("else_branch", rest)):
        inner = Nodes(f"{n.scope}{branch}_{names[0]}/", dtype=n.dtype)
        inner_out = _choose(inner, names, z)
        branches[branch] = ir.Graph([], [inner_out], nodes=inner.nodes, name=names[0])
    wanted = ir.RefAttr("value_string", "activation_type", ir.AttributeType.STRING)
    given = n("Unsqueeze", n("Constant", value_string=wanted), n.const([0]))
    # Both from one tensor: numpy's string types have a length, and onnx's evaluator compares types.
    both = n("Concat", given, n("Constant", value_strings=[name]), axis=0)
    is_first = n("Equal", *n.many("Split", both, outputs=2, axis=0, num_outputs=2))
    return n("If", is_first, **branches)


def _activate(n: Nodes, name: str, z: ir.Value) -> ir.Value:
    kernel, pointwise = kernel_named(name)
    if not kernel.gated:
        return programs.build(pointwise, n, [z])
    pairs = n("Reshape", z, n.const([0, 0, -1, 2]))  # gate 0, up 0, gate 1, up 1, ...
    return programs.build(pointwise, n, [n("Gather", pairs, n.const(i), axis=3) for i in (0, 1)])
