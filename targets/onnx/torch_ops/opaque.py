"""``upcycle::moe`` while a graph is being made: one opaque node, which `lower` replaces.

Shape suffixes: those of `upcycle.kernels`.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

import upcycle.kernels.torch_operation  # noqa: F401  (defines the operation)
from upcycle.onnx.nodes import Nodes, Traced
from upcycle.onnx.shapes import fixed_size

OPAQUE = ("upcycle", "MoE")
_FLOATS = [f"tensor({name})" for name in ("float", "float16", "bfloat16")]
_OPTIONAL = OpSchema.FormalParameterOption.Optional
_SCHEMA = OpSchema(
    name=OPAQUE[1],
    domain=OPAQUE[0],
    since_version=1,
    inputs=[
        OpSchema.FormalParameter("x", "T"),
        OpSchema.FormalParameter("weights", "W"),  # of the routers, which may be wider
        OpSchema.FormalParameter("up", "T"),
        OpSchema.FormalParameter("down", "T"),
        OpSchema.FormalParameter("up_bias", "T", param_option=_OPTIONAL),
    ],
    outputs=[OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", _FLOATS, ""), ("W", _FLOATS, "")],
    # What sets apart nodes of equal inputs, which would become one.
    attributes=[OpSchema.Attribute("program", OpSchema.AttrType.STRING)],
)
_NODE = Op(Opset(OPAQUE[0], 1), OPAQUE[1], _SCHEMA)


def opaque(
    x_TD: ir.Value,
    index_TK: ir.Value,
    weights_TK: ir.Value,
    up_EGD: ir.Value,
    up_bias_EG: ir.Value | None,
    down_EOI: ir.Value,
    program: str,
    down_bias_EO: ir.Value | None = None,
) -> ir.Value:
    """The experts as one node, [T, O], which gets a weight for each expert: zero if not chosen.

    So no runtime breaks a tie. `program` is what the experts compute. Output biases are a product
    with the weights beside it.
    """
    n = Traced(dtype=weights_TK.dtype or ir.DataType.FLOAT)
    weights_TE = by_expert(n, x_TD, index_TK, weights_TK, fixed_size(up_EGD, 0))
    bias = [] if up_bias_EG is None else [up_bias_EG]
    y_TO: ir.Value = _NODE(x_TD, weights_TE, up_EGD, down_EOI, *bias, program=program)
    return with_bias(n, y_TO, weights_TE, down_bias_EO)


def with_bias(
    n: Nodes, y_TO: ir.Value, weights_TE: ir.Value, down_bias_EO: ir.Value | None
) -> ir.Value:
    """The output with those of the output biases that the weights choose, [T, O]."""
    if down_bias_EO is None:
        return y_TO
    if down_bias_EO.dtype not in (None, n.dtype):
        weights_TE = n("CastLike", weights_TE, down_bias_EO)
    return n("Add", y_TO, n("MatMul", weights_TE, down_bias_EO))


def by_expert(
    n: Nodes, x_TD: ir.Value, index_TK: ir.Value, weights_TK: ir.Value, num_experts: int
) -> ir.Value:
    """A weight for each expert, [T, E]; no expert is twice among the chosen ones of a token."""
    tokens = n("Shape", x_TD, start=0, end=1)
    zeros_TE = n.zeros(n("Concat", tokens, n.const([num_experts]), axis=0))
    return n("ScatterElements", zeros_TE, index_TK, weights_TK, axis=1)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.upcycle.moe.default: opaque}
