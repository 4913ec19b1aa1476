"""Operations that fuse a product with what follows it, as the nodes that they stand for.

ONNX Runtime's optimiser writes them, and ``Gemm`` may scale and add anything. The nodes are not in
the graph; where an FFN ends inside of one, `put_in` lets them take its place.
"""

import math
from collections.abc import Callable

import onnx_ir as ir

from upcycle.onnx.nodes import Nodes

MS = "com.microsoft"
# What a fused activation reads, by its name: the attributes of the operation of that name.
_NUMBERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh"), ()),
    **dict.fromkeys(("Elu", "LeakyRelu", "ThresholdedRelu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),  # inputs
}


def spelled_out(node: ir.Node) -> list[ir.Node]:
    """The nodes that `node` stands for, of which the last makes its output; none if it is plain."""
    split = _SPLIT.get((node.domain, node.op_type))
    known = node.attributes.get_string("activation", "") in {"", *_NUMBERS}
    if split is None or not known or len(node.inputs) < 2 or node.inputs[1] is None:
        return []
    n = Nodes(f"{node.outputs[0].name}/")
    split(n, node)
    nodes = list(n.nodes)
    kept = [part for part in nodes if part.op_type != "Constant"]
    if len(kept) < 2:
        drop(nodes)
        return []
    kept[0].name = node.name
    for part in nodes:
        part.metadata_props.update(node.metadata_props)
    return nodes


def drop(nodes: list[ir.Node]) -> None:
    """Let nodes that are not in the graph read nothing any more."""
    for node in nodes:
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)


def put_in(node: ir.Node, nodes: list[ir.Node]) -> ir.Value:
    """Put the `nodes` in the place of `node`; returns the new value of its output."""
    graph, (old,), new = node.graph, node.outputs, nodes[-1].outputs[0]
    assert graph is not None
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
    return new


def _gemm(n: Nodes, node: ir.Node) -> None:
    x, w, c = (*node.inputs, None)[:3]
    attributes = node.attributes
    alpha, beta = (attributes.get_float(key, 1.0) for key in ("alpha", "beta"))
    kept = {k: attributes.get_int(k, 0) for k in ("transA", "transB") if k in attributes}
    row = c if alpha == beta == 1 and _is_row(c, w, kept.get("transB", 0)) else None
    domain = MS if node.op_type == "FusedMatMul" else ""
    kind = node.op_type if domain else "Gemm"
    y = n(kind, *(v for v in (x, w, row) if v is not None), domain=domain, **kept)
    if alpha != 1:
        y = n("Mul", y, _number(n, w, alpha))
    if c is not None and row is None:
        y = n("Add", y, c if beta == 1 else n("Mul", c, _number(n, w, beta)))
    slopes = [attributes.get_float(f"activation_{k}", math.nan) for k in ("alpha", "beta")]
    _activate(n, node, y, [slope for slope in slopes if slope == slope])


def _convolution(n: Nodes, node: ir.Node) -> None:
    x, w, b, z = (*node.inputs, None, None)[:4]
    own = {key: value for key, value in node.attributes.items() if "activation" not in key}
    y = n("Conv", *((x, w) if b is None else (x, w, b)))
    n.nodes[-1].attributes.update(own)
    if z is not None:
        y = n("Add", y, z)
    given = node.attributes.get("activation_params")
    _activate(n, node, y, [] if given is None else list(given.as_floats()))


def _activate(n: Nodes, node: ir.Node, y: ir.Value, numbers: list[float]) -> None:
    kind = node.attributes.get_string("activation", "")
    if kind == "Clip":
        n(kind, y, *(_number(n, node.inputs[1], value) for value in numbers))
    elif kind:
        n(kind, y, **dict(zip(_NUMBERS[kind], numbers, strict=False)))


def _number(n: Nodes, like: ir.Value | None, value: float) -> ir.Value:
    tensor = None if like is None else ir.convenience.get_const_tensor(like)
    dtype = ir.DataType.FLOAT if tensor is None else tensor.dtype
    return n("Constant", value=ir.tensor(value, dtype=dtype))


def _is_row(c: ir.Value | None, w: ir.Value | None, transposed: int) -> bool:
    """Whether `c` holds one number for each neuron; where that is not known, it counts as so."""
    row = None if c is None else ir.convenience.get_const_tensor(c)
    weight = None if w is None else ir.convenience.get_const_tensor(w)
    if row is None or weight is None or len(weight.shape) != 2:
        return weight is None
    width = weight.shape[0 if transposed else 1]
    return row.size == width and len(row.shape) > 0 and row.shape[-1] == width


_SPLIT: dict[tuple[str, str], Callable[[Nodes, ir.Node], None]] = {
    ("", "Gemm"): _gemm,
    (MS, "FusedConv"): _convolution,
    (MS, "FusedGemm"): _gemm,
    (MS, "FusedMatMul"): _gemm,
}
