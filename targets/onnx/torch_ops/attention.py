"""torch's attention in standard ONNX operations, with fewer of them than its exporter takes.

The exporter scales queries and keys, transposes keys by their shape, and looks for NaN at every
weight of every head: a tenth of the time of a decoder that reads 512 tokens. A query that may
attend to nothing attends to everything there, or gives NaN; in torch it gives zeros.

Shape suffixes: B batch, H heads, J heads of keys and values, T queries, S keys, D d_head.
"""

import math

import onnx_ir as ir

from upcycle.onnx.nodes import Traced
from upcycle.onnx.shapes import fixed_size


def attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """``torch.nn.functional.scaled_dot_product_attention`` in eval mode, up to rounding.

    Its arguments: `query` [B, H, T, D] (torch takes other ranks apart before), `key` [B, J, S, D],
    `value` [B, J, S, O], `attn_mask` that broadcasts to [B, H, T, S]. H, J and D are fixed.
    """
    n = Traced(dtype=query.dtype or ir.DataType.FLOAT)
    if enable_gqa:
        key, value = (_for_all_heads(n, shared, query) for shared in (key, value))
    if is_causal:
        attn_mask = _added(n, _causal(n, query, key))
    elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        attn_mask = _added(n, attn_mask)
    scale = 1 / math.sqrt(fixed_size(query, -1)) if scale is None else float(scale)
    query = n("Mul", query, n.const(scale))
    key = n("Transpose", key, perm=[0, 1, 3, 2])
    scores_BHTS = n("MatMul", query, key)
    if attn_mask is None:
        return n("MatMul", n("Softmax", scores_BHTS, axis=-1), value)
    weights_BHTS = n("Softmax", n("Add", scores_BHTS, attn_mask), axis=-1)
    # All weights of a query are NaN or none is, so one look is enough.
    first_BHT1 = n("Slice", weights_BHTS, n.const([0]), n.const([1]), n.const([-1]))
    y_BHTO = n("MatMul", weights_BHTS, value)
    return n("Where", n("IsNaN", first_BHT1), n.const(0.0), y_BHTO)


def _added(n: Traced, seen: ir.Value) -> ir.Value:
    """What is added to the scores for booleans."""
    return n("Where", seen, n.const(0.0), n.const(-math.inf))


def _causal(n: Traced, query: ir.Value, key: ir.Value) -> ir.Value:
    """Booleans [T, S]."""
    t, s = (
        n("Range", n.const(0), n("Squeeze", n("Shape", x, start=-2, end=-1)), n.const(1))
        for x in (query, key)
    )
    return n("GreaterOrEqual", n("Unsqueeze", t, n.const([1])), s)


def _for_all_heads(n: Traced, shared: ir.Value, query: ir.Value) -> ir.Value:
    """Keys or values [B, J, S, D] -> [B, H, S, D], each head for several heads of queries."""
    heads, groups = fixed_size(query, -3), fixed_size(shared, -3)
    if heads == groups:
        return shared
    each = n("Unsqueeze", shared, n.const([-3]))
    many = n("Expand", each, n.const([heads // groups, 1, 1]))
    ends = [n("Shape", shared, end=-3), n.const([heads]), n("Shape", shared, start=-2)]
    return n("Reshape", many, n("Concat", *ends, axis=0))
