"""A rounded matrix as floats, in standard operations.

Shape suffixes: N rows, K inputs of a row, B blocks of a row, b inputs of a block.
"""

import onnx_ir as ir

from upcycle.onnx.nodes import Nodes


def matrix(n: Nodes, numbers: ir.Value, scale: ir.Value, block: int, *, unpack: bool) -> ir.Value:
    """The floats of a matrix, transposed: [K, N], as a product reads them.

    ONNX Runtime folds what there is of constants when it loads a file, and never a
    ``DequantizeLinear``; so with `unpack` a session holds floats, and else 8-bit numbers.
    """
    if not unpack:
        q_KN, scale_BN = (n("Transpose", value, perm=[1, 0]) for value in (numbers, scale))
        return n("DequantizeLinear", q_KN, scale_BN, axis=0, block_size=block)
    q_NBb = n("CastLike", n("Reshape", numbers, n.const([0, -1, block])), scale)
    w_NBb = n("Mul", q_NBb, n("Unsqueeze", scale, n.const([2])))
    return n("Transpose", n("Reshape", w_NBb, n.const([0, -1])), perm=[1, 0])
