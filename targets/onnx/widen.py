"""Arithmetic that ONNX Runtime lacks in bfloat16 on the CPU, in float32 between two casts.

A model in float32 may compute a little in bfloat16 (Falcon its ALiBi). PyTorch computes such an
operation in float32 and rounds the result, so the casts change nothing.
"""

import onnx_ir as ir

OPERATIONS = frozenset({"Add", "Div", "Mul", "Neg", "Pow", "Sub"})
NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widen(model: ir.Model) -> None:
    """Cast what `OPERATIONS` read in bfloat16 to float32, and their results back; in place."""
    for node in list(model.graph):
        result = node.outputs[0]
        if node.op_type not in OPERATIONS or node.domain or result.dtype != NARROW:
            continue
        graph = node.graph
        assert graph is not None
        for i, value in enumerate(node.inputs):
            if value is not None:
                wide = ir.node("Cast", [value], {"to": WIDE})
                wide.outputs[0].dtype, wide.outputs[0].shape = WIDE, value.shape
                graph.insert_before(node, wide)
                node.replace_input_with(i, wide.outputs[0])
        uses = list(result.uses())
        back = ir.node("Cast", [result], {"to": NARROW})
        narrow = back.outputs[0]
        narrow.dtype, narrow.shape, result.dtype = NARROW, result.shape, WIDE
        graph.insert_after(node, back)
        for user, i in uses:
            user.replace_input_with(i, narrow)
