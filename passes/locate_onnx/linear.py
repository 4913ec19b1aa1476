"""The linear maps of an ONNX graph as torch calls, those with quantised weights included.

A weight that the graph computes, as from integers and scales, leads to a call that the analysis
knows as a linear map without a stored weight, so that its FFN is refused with a reason.
"""

import math
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import fx
from torch.nn import functional as F

from upcycle.passes.locate.linear import parameter_of
from upcycle.passes.locate_onnx.names import label_of
from upcycle.passes.locate_onnx.program import NoTorchCallError, Reader, Translation

QUANTISED = "its weights are quantised ({}): start from the file with float weights"
SWAPPED = (
    "{} maps the first of two axes, as rows of features: export the model with its weight on the "
    "right and its features last"
)
WIDER = "its product {} has axes that its input lacks: store its weight as a matrix"


def _inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * count][:count]


def _weight(g: Reader, value: ir.Value | None, node: ir.Node, *, transposed: bool) -> fx.Node:
    """The node of a constant [in, out] weight ([out, in] if `transposed`), as [in, out]."""
    if value is None or not g.origins.is_constant(value):
        raise NoTorchCallError("no weight")
    weight = g.matrix(value)
    if not weight.meta["known"]:
        producer = value.producer()
        source = producer.inputs[0] if producer is not None else None
        shape = None if source is None else g.node_of(source).meta["shape"]
        weight.meta.update(shape=shape, known=True)  # dequantised, which keeps the shape
    if len(weight.meta["shape"]) != 2:
        raise NoTorchCallError("no matrix")
    g.claim_path(value, node)
    if stored := _integers_behind(value):
        g.refused[g.path] = QUANTISED.format(stored)
    return g.emit(torch.t, weight) if transposed else weight


def _integers_behind(value: ir.Value) -> str:
    """The type of the integers that a weight is computed from, if it is."""
    for constant in _constants(value):
        if constant.dtype.is_integer() and constant.size > 1 and len(constant.shape) > 1:
            return constant.dtype.name.lower()
    return ""


def _constants(value: ir.Value) -> Iterator[ir.TensorProtocol]:
    """The constants that a value is computed from; by hand, as the walk ends at them."""
    todo, seen = [value], {value}
    while todo:
        current = todo.pop()
        tensor, producer = ir.convenience.get_const_tensor(current), current.producer()
        if tensor is not None:
            yield tensor
        elif producer is not None:
            more = [v for v in dict.fromkeys(producer.inputs) if v is not None and v not in seen]
            seen.update(more)
            todo += reversed(more)


def _apply(g: Reader, value: ir.Value | None, weight: fx.Node, *, rank: int = 3) -> fx.Node:
    """``x @ weight``, which is ``linear`` where the weight is computed."""
    if value is None or g.origins.is_constant(value):
        raise NoTorchCallError("no data")
    x = g.data(value, weight, weight.meta["shape"][0], rank)
    stored = (
        ir.convenience.get_const_tensor(weight.meta["value"]) if "value" in weight.meta else None
    )
    more = 0 if stored is None else len(stored.shape) - len(x.meta["shape"])
    if more > 0:
        g.refused[g.path] = WIDER.format(g.path)
        y = g.emit(F.linear, x, g.opaque("rearranged", weight, shape=weight.meta["shape"][::-1]))
        return g.emit(torch.reshape, y, (*[1] * more, *y.meta["shape"]))
    if parameter_of(weight) is None:
        return g.emit(F.linear, x, g.emit(torch.t, weight))
    return g.emit(torch.matmul, x, weight)


def _product(g: Reader, node: ir.Node) -> fx.Node:
    """A matrix product, with a bias where the operation has one."""
    x, w, c = _inputs(node, 3)
    rank = 2 if node.op_type == "Gemm" else 3
    if node.attributes.get_int("transA", 0) != 0:
        return _swapped(g, node, x, w, node.attributes.get_int("transB", 0) == 0)
    if (
        x is not None
        and w is not None
        and g.origins.is_constant(x)
        and not g.origins.is_constant(w)
    ):
        return _swapped(g, node, w, x, False)
    weight = _weight(g, w, node, transposed=node.attributes.get_int("transB", 0) == 1)
    if c is None:
        return _apply(g, x, weight, rank=rank)
    found = parameter_of(weight)
    bias = g.per_neuron(c, found.name if found else g.path)
    is_bias = bias.op == "get_attr" and bias.meta["shape"] == weight.meta["shape"][1:]
    if not is_bias or found is None or x is None or g.origins.is_constant(x):
        return g.emit(torch.add, _apply(g, x, weight, rank=rank), bias)
    return g.emit(torch.addmm, bias, g.data(x, weight, weight.meta["shape"][0], rank), weight)


def _swapped(
    g: Reader, node: ir.Node, data: ir.Value | None, w: ir.Value | None, turned: bool
) -> fx.Node:
    """A product along the first of two axes: a linear map that is refused with a reason."""
    if data is None or w is None or g.origins.is_constant(data) or not g.origins.is_constant(w):
        raise NoTorchCallError("no weight")
    weight = g.matrix(w)
    shape = weight.meta["shape"]
    if len(shape) != 2 or len(node.inputs) > 2:
        raise NoTorchCallError("no matrix")
    g.claim_path(w, node)
    g.refused[g.path] = SWAPPED.format(f"its {node.op_type} node {label_of(node)}")
    x = g.data(data, weight, shape[0 if turned else 1], 2)
    opaque = g.opaque("rearranged", weight, shape=shape[::-1] if turned else shape)
    y = g.emit(F.linear, g.emit(torch.transpose, x, -1, -2), opaque)
    return y if node.op_type == "Gemm" else g.emit(torch.transpose, y, -1, -2)


def _convolution(g: Reader, node: ir.Node) -> fx.Node:
    """Only what reads one position: other convolutions end a region like any opaque call."""
    x, w, b = _inputs(node, 3)
    if x is None or w is None or g.origins.is_constant(x) or not g.origins.is_constant(w):
        raise NoTorchCallError("no weight")
    weight = g.node_of(w)
    spatial = weight.meta["shape"][2:]
    strides = node.attributes.get_ints("strides", [1] * len(spatial))
    pads = node.attributes.get_ints("pads", [0] * 2 * len(spatial))
    single = math.prod(spatial) == 1 and set(strides) == {1} and not any(pads)
    if not single or node.attributes.get_int("group", 1) != 1 or not 1 <= len(spatial) <= 3:
        raise NoTorchCallError("a convolution of several positions")
    g.claim_path(w, node)
    bias = None if b is None else g.per_neuron(b, str(g.origins.source_of(w).name))
    call = (F.conv1d, F.conv2d, F.conv3d)[len(spatial) - 1]
    return g.emit(call, g.node_of(x), weight, bias)


def _einsum(g: Reader, node: ir.Node) -> fx.Node:
    x, w = _inputs(node, 2)
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, _, letters = equation.partition("->")[0].partition(",")
    if (
        x is None
        or w is None
        or len(letters) != 2
        or g.origins.is_constant(x)
        or not g.origins.is_constant(w)
    ):
        raise NoTorchCallError("no weight")
    g.claim_path(w, node)
    weight = g.node_of(w)
    width = weight.meta["shape"][letters.index(left[-1])] if left[-1:] in letters else 1
    return g.emit(torch.einsum, equation, g.data(x, weight, width, len(left)), weight)


def _dynamic_quantisation(g: Reader, node: ir.Node) -> dict[ir.Value, fx.Node]:
    """As if it did not round: what reads it is refused for its weight."""
    found = {node.outputs[0]: g.emit(torch.clone, g.first_input(node))}
    return found | {value: g.unknown_number() for value in node.outputs[1:]}


def _quantised(data: int, weight: int, kind: str = "int8", *, rows: bool = False) -> Translation:
    """A product whose weight, the input number `weight`, is stored in integers."""

    def translate(g: Reader, node: ir.Node) -> fx.Node:
        x, w = node.inputs[data], node.inputs[weight]
        if w is None or not g.origins.is_constant(w):
            raise NoTorchCallError("no weight")
        stored = g.node_of(w)
        shape = stored.meta["shape"]
        if rows:  # packed, [out, in / blocks, bytes]
            shape = (node.attributes.get_int("K", 1), node.attributes.get_int("N", 1))
        if len(shape) != 2:
            raise NoTorchCallError("no matrix")
        g.claim_path(w, node)
        g.refused[g.path] = QUANTISED.format(kind)
        return _apply(g, x, g.opaque("dequantize", stored, shape=shape))

    return translate


MS = "com.microsoft"
LINEAR: dict[tuple[str, str], Translation] = {
    ("", "Conv"): _convolution,
    ("", "DynamicQuantizeLinear"): _dynamic_quantisation,
    ("", "Einsum"): _einsum,
    ("", "Gemm"): _product,
    ("", "MatMul"): _product,
    ("", "MatMulInteger"): _quantised(0, 1),
    ("", "QLinearMatMul"): _quantised(0, 3),
    (MS, "DynamicQuantizeMatMul"): _quantised(0, 1),
    (MS, "FusedMatMul"): _product,
    (MS, "MatMulBnb4"): _quantised(0, 1, "4-bit", rows=True),
    (MS, "MatMulIntegerToFloat"): _quantised(0, 1),
    (MS, "MatMulNBits"): _quantised(0, 1, "4-bit", rows=True),
    (MS, "QGemm"): _quantised(0, 3),
}
