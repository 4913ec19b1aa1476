"""Put MoE layers in the place of FFNs in an existing graph.

The router becomes standard operations and the experts the opaque node that `lower` replaces, so
that a layer in a foreign file is built by the same code as one in a file that torch exported.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from upcycle.moe import MoE
from upcycle.routing import Router
from upcycle.targets.onnx.nodes import Nodes
from upcycle.targets.onnx.symbolic import OPAQUE


@dataclass(frozen=True)
class Tensors:
    """The tensors of one layer as values of the graph; `output_bias` is that of the FFN."""

    router: ir.Value
    up: ir.Value
    down: ir.Value
    router_bias: ir.Value | None = None
    up_bias: ir.Value | None = None
    output_bias: ir.Value | None = None


@dataclass(frozen=True)
class Place:
    """Where a layer goes: the tensor `x` that it reads, and the `output` that it replaces.

    `rank` and `dtype` (float32 or a narrower one) are those of `x`.
    """

    x: ir.Value
    output: ir.Value
    rank: int
    dtype: ir.DataType


def insert_layer(model: ir.Model, key: str, layer: MoE, tensors: Tensors, place: Place) -> ir.Value:
    """Make what reads the output read a layer of `x`; the nodes between are left without use.

    Args:
        model: the graph; changed in place.
        key: name of the layer, unique in the graph.
        layer: its shapes and options; may be on the meta device.
        tensors: its weights; what is not in the graph yet becomes an initializer.
        place: where it goes.

    Returns:
        The tensor in the place of the output, with its name.
    """
    graph = model.graph
    for value in (v for v in vars(tensors).values() if v is not None):
        if value.producer() is None and value.name not in graph.initializers:
            graph.register_initializer(value)
    n = Nodes(f"{key}/route/")  # the names of `lower` start with the key alone
    rank, axis = place.rank, layer.config["axis"]
    narrow = place.dtype != ir.DataType.FLOAT
    x = place.x
    tokens = n("Cast", x, to=ir.DataType.FLOAT.value, name="tokens") if narrow else x
    if axis == 1:  # a convolution of [batch, channels, ...]
        tokens = n("Transpose", tokens, perm=[0, *range(2, rank), 1])
    shape = n("Shape", tokens, end=-1)
    x_TD = n("Reshape", tokens, n.const([-1, layer.experts.hidden_dim]))
    weights_TE = _route(n, x_TD, layer.router, tensors)
    inputs = [x_TD, weights_TE, _single(n, tensors.up), _single(n, tensors.down)]
    if tensors.up_bias is not None:
        inputs.append(_single(n, tensors.up_bias))
    domain, op_type = OPAQUE
    y_TO = n(op_type, *inputs, domain=domain, name="experts", layer=key)
    if tensors.output_bias is not None:
        flat = n("Reshape", _single(n, tensors.output_bias), n.const([-1]))
        y_TO = n("Add", y_TO, flat, name="bias")
    width = n.const([layer.config["d_out"]])
    y = n("Reshape", y_TO, n("Concat", shape, width, axis=0))
    if axis == 1:
        y = n("Transpose", y, perm=[0, rank - 1, *range(1, rank - 1)])
    if narrow:
        y = n("Cast", y, to=place.dtype.value)
    _take_place(place.output, n, y)
    return y


def _route(n: Nodes, x_TD: ir.Value, router: Router, tensors: Tensors) -> ir.Value:
    """What `Router.forward` computes, as a weight for each expert; zero where it is not chosen."""
    rows = [tensors.router] + ([] if tensors.router_bias is None else [tensors.router_bias])
    logits_TE = n("Gemm", x_TD, *rows, transB=1, name="router")
    count = n.const([router.config["select"]["k"]])
    top_TK, index_TK = n.many("TopK", logits_TE, count, outputs=2, axis=-1, name="chosen")
    if router.weights == "one":
        one = ir.tensor(np.array([router.scale], np.float32))
        weights_TK = n("ConstantOfShape", n("Shape", top_TK), value=one)
    else:
        if router.weights == "softmax":
            p_TE = n("Softmax", logits_TE, axis=-1)
            weights_TK = n("GatherElements", p_TE, index_TK, axis=1)
        else:
            weights_TK = n("Softmax", top_TK, axis=-1)
        if router.scale != 1:
            weights_TK = n("Mul", weights_TK, n.const(float(router.scale)))
    zeros_TE = n("ConstantOfShape", n("Shape", logits_TE))
    return n("ScatterElements", zeros_TE, index_TK, weights_TK, axis=1, name="weights")


def _single(n: Nodes, value: ir.Value) -> ir.Value:
    """The tensor in float32, in which the layer computes."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.FLOAT:
        return value
    return n("Cast", value, to=ir.DataType.FLOAT.value, name=f"{value.name}/float32")


def _take_place(old: ir.Value, n: Nodes, new: ir.Value) -> None:
    """Put the nodes right after the one that made `old`, and give the new value its name."""
    producer = old.producer()
    assert producer is not None
    assert producer.graph is not None
    name = old.name
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = f"{name}/dense"
    new.name = name
    producer.graph.insert_after(producer, n.nodes)


def unique_keys(paths: Mapping[str, int]) -> dict[str, list[str]]:
    """Names for the layers of each path, which may be applied at several places."""
    return {
        path: [path if count == 1 else f"{path}.{i}" for i in range(count)]
        for path, count in paths.items()
    }
