"""The operation ``upcycle::moe`` for torch's own ONNX exporter.

    program = torch.export.export(model, arguments)
    torch.onnx.export(program, dynamo=True, custom_translation_table=TABLE)

Each layer becomes standard operations. `upcycle convert --target onnx` knows more of a layer and so
has other forms of it, for which it begins with `upcycle.targets.onnx.torch_ops.opaque`.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width,
G = arity * I.
"""

import json
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from upcycle.onnx.nodes import Traced
from upcycle.onnx.shapes import fixed_size
from upcycle.pointwise import Pointwise
from upcycle.targets.onnx.forms.unrolled import Stack, grouped
from upcycle.targets.onnx.torch_ops.opaque import by_expert, with_bias


def moe(
    x_TD: ir.Value,
    index_TK: ir.Value,
    weights_TK: ir.Value,
    up_EGD: ir.Value,
    up_bias_EG: ir.Value | None,
    down_EOI: ir.Value,
    program: str,
    down_bias_EO: ir.Value | None = None,
) -> ir.Value:
    """What ``upcycle::moe`` computes, each expert on its own tokens only, [T, O]."""
    num_experts = fixed_size(up_EGD, 0)
    n = Traced(dtype=up_EGD.dtype or ir.DataType.FLOAT)
    weights_TK = n("CastLike", weights_TK, up_EGD)
    weights_TE = by_expert(n, x_TD, index_TK, weights_TK, num_experts)
    pointwise = Pointwise.from_json(json.loads(program))
    up, down = Stack(up_EGD), Stack(down_EOI)
    y_TO = grouped(n, pointwise, num_experts, x_TD, weights_TE, up, up_bias_EG, down)
    return with_bias(n, y_TO, weights_TE, down_bias_EO)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.upcycle.moe.default: moe}
