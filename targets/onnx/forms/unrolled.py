"""Experts as standard ONNX operations: tokens in groups, one for each expert, and back.

Shape suffixes: T tokens, D d_model, O d_out, E experts, I expert width, G rows of an expansion,
N pairs of a token and one of its experts, in the order of the experts, n those of one expert,
K the most experts that a token has.
"""

from dataclasses import dataclass

import onnx_ir as ir

from upcycle.onnx.nodes import Nodes
from upcycle.pointwise import Pointwise
from upcycle.targets.onnx.forms import activation as programs
from upcycle.targets.onnx.forms.unpack import matrix

INT64 = ir.DataType.INT64.value
SINGLE = ir.DataType.FLOAT.value


@dataclass(frozen=True)
class Stack:
    """The matrices of all experts.

    Attributes:
        matrices: [E, N, K], floats or int8.
        scale: [E, N, blocks of a row] beside int8.
        block: inputs of a block.
        unpack: as for `matrix`.
    """

    matrices: ir.Value
    scale: ir.Value | None = None
    block: int = 0
    unpack: bool = False

    def of(self, n: Nodes, expert: ir.Value) -> ir.Value:
        """One matrix in floats: [N, K], or [K, N] if it was rounded."""
        numbers = n("Gather", self.matrices, expert, axis=0)
        if self.scale is None:
            return numbers
        scale = n("Gather", self.scale, expert, axis=0)
        return matrix(n, numbers, scale, self.block, unpack=self.unpack)

    @property
    def has_rows(self) -> int:
        """For ``transB``."""
        return int(self.scale is None)


def grouped(
    n: Nodes,
    pointwise: Pointwise,
    num_experts: int,
    x_TD: ir.Value,
    weights_TE: ir.Value,
    up_EGD: Stack,
    up_bias_EG: ir.Value | None,
    down_EOI: Stack,
) -> ir.Value:
    """Each expert only on the tokens whose weight for it is not zero; the value is [T, O].

    For each expert there are only two products and the activation: at one token a node takes ONNX
    Runtime as long as 30,000 weights. The sum over a token's experts is a product for the same
    reason, and because ScatterND loses some of the rows that several threads add to one token.
    """
    chosen_ET = n("Transpose", n("Cast", weights_TE, to=ir.DataType.BOOL.value), perm=[1, 0])
    one_ET = n("Cast", chosen_ET, to=INT64)
    pair_2N = n("NonZero", chosen_ET)  # by expert, then by token
    token_N = n("Gather", pair_2N, n.const(1), axis=0)
    sizes_E = n("ReduceSum", one_ET, n.const([1]), keepdims=0)
    groups = n.many("Split", token_N, sizes_E, outputs=num_experts, axis=0)
    out = []
    for expert, token_n in enumerate(groups):
        n.scope = f"expert_{expert}/"
        e = n.const(expert)
        rows = [up_EGD.of(n, e)]
        if up_bias_EG is not None:
            rows.append(n("Gather", up_bias_EG, e, axis=0))
        x_nD = n("Gather", x_TD, token_n, axis=0)
        z_nG = n("Gemm", x_nD, *rows, transB=up_EGD.has_rows, name="up")
        z = [z_nG]
        if pointwise.arity > 1:
            z = n.many("Split", z_nG, outputs=pointwise.arity, axis=1, num_outputs=pointwise.arity)
        hidden_nI = programs.build(pointwise, n, z)
        down = down_EOI.of(n, e)
        out.append(n("Gemm", hidden_nI, down, transB=down_EOI.has_rows, name="down"))
    n.scope = ""
    return _sum(n, out, weights_TE, one_ET, pair_2N, down_EOI.matrices)


def _sum(
    n: Nodes,
    out: list[ir.Value],
    weights_TE: ir.Value,
    one_ET: ir.Value,
    pair_2N: ir.Value,
    down_EOI: ir.Value,
) -> ir.Value:
    """The weighted sum over the experts of each token, in their order, in float32: [T, O].

    Tokens with fewer than K experts read a row of zeros.
    """
    width = n("Shape", down_EOI, start=1, end=2)
    y_NO = n("Concat", *out, n.zeros(n("Concat", n.const([1]), width, axis=0)), axis=0)
    pairs = n("Shape", pair_2N, start=1, end=2)
    row_N = n("Range", n.const(0), n("Squeeze", pairs), n.const(1))
    no_ET = n("Expand", pairs, n("Shape", one_ET))
    row_ET = n("ScatterND", no_ET, n("Transpose", pair_2N, perm=[1, 0]), row_N)
    most = n("Concat", n("ReduceSum", one_ET, n.const([0]), keepdims=0), n.const([1]), axis=0)
    k = n("ReduceMax", most)  # [1]; at least one, for no tokens and for tokens without experts
    row_TE = n("Transpose", row_ET, perm=[1, 0])
    row_TK, expert_TK = n.many("TopK", row_TE, k, outputs=2, axis=1, largest=0)
    weights_TK = n("GatherElements", weights_TE, expert_TK, axis=1)
    y_TKO = n("Gather", y_NO, row_TK, axis=0)
    if n.is_half:
        weights_TK, y_TKO = (n("Cast", value, to=SINGLE) for value in (weights_TK, y_TKO))
    y_T1O = n("MatMul", n("Unsqueeze", weights_TK, n.const([1])), y_TKO)
    y_TO = n("Squeeze", y_T1O, n.const([1]))
    return n("CastLike", y_TO, weights_TE) if n.is_half else y_TO
