"""All experts as one dense FFN in standard ONNX operations, whose hidden numbers are weighted.

Shape suffixes: T tokens, D d_model, O d_out, E experts, I expert width, G rows of an expansion.
"""

import onnx_ir as ir

from upcycle.onnx.nodes import Nodes
from upcycle.pointwise import Pointwise
from upcycle.targets.onnx.forms import activation as programs
from upcycle.targets.onnx.forms.unrolled import Stack


def dense(
    n: Nodes,
    pointwise: Pointwise,
    num_experts: int,
    x_TD: ir.Value,
    weights_TE: ir.Value,
    up: Stack,
    up_bias_EG: ir.Value | None,
    down: Stack,
) -> ir.Value:
    """Every expert on every token, in two products; the value is [T, O].

    A little slower than the dense FFN of all neurons, whatever the number of tokens, and faster
    than many small experts on a part of the tokens each.
    """
    up_EGD, down_EOI = up.matrices, down.matrices  # floats: rounded layers are unrolled
    rest = n.const([-1])
    up_FD = n("Reshape", up_EGD, n("Concat", rest, n("Shape", up_EGD, start=2), axis=0))
    rows = [up_FD] if up_bias_EG is None else [up_FD, n("Reshape", up_bias_EG, rest)]
    z_TEG = n("Reshape", n("Gemm", x_TD, *rows, transB=1, name="z"), n.const([0, num_experts, -1]))
    z = [z_TEG]
    if pointwise.arity > 1:
        z = n.many("Split", z_TEG, outputs=pointwise.arity, axis=2, num_outputs=pointwise.arity)
    hidden_TEI = programs.build(pointwise, n, z)
    hidden_TEI = n("Mul", hidden_TEI, n("Unsqueeze", weights_TE, n.const([2])))
    out = n("Concat", rest, n("Shape", down_EOI, start=1, end=2), axis=0)
    down_FO = n("Reshape", n("Transpose", down_EOI, perm=[0, 2, 1]), out)
    return n("Gemm", n("Reshape", hidden_TEI, n.const([0, -1])), down_FO, name="y")
