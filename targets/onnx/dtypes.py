"""A model in a narrow type, for an ONNX file that computes in it; and bfloat16 in other files."""

import copy

import onnx_ir as ir
import torch
from torch import Tensor, nn

from upcycle.layers.moe import MoE

# What `widen` changes.
OPERATIONS = frozenset({"Add", "Div", "Mul", "Neg", "Pow", "Sub"})
NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def narrowed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in `dtype`, but for its routers, which choose experts in float32."""
    model = copy.deepcopy(model)
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    single = {id(t) for router in routers for t in (*router.parameters(), *router.buffers())}

    def cast(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and id(tensor) not in single
        return tensor.to(dtype) if is_cast else tensor

    model._apply(cast)  # type: ignore[no-untyped-call]
    return model


def widen(model: ir.Model) -> None:
    """Cast what `OPERATIONS` read in bfloat16 to float32, and their results back; in place.

    ONNX Runtime lacks them in bfloat16 on the CPU, and a model in float32 may compute a little in
    it (Falcon its ALiBi). PyTorch computes such an operation in float32 and rounds the result, so
    the casts change nothing.
    """
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
