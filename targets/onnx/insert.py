"""Put MoE layers in the place of FFNs in an existing graph.

The layer itself is exported as it would be inside a model: router, shared expert and compensation
become standard operations, and the experts the opaque node that `lower` replaces.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from upcycle.ir.layer_weights import empty_layer
from upcycle.layers.config import LayerConfig
from upcycle.layers.moe import MoE
from upcycle.onnx.nodes import Nodes
from upcycle.targets.onnx.layers import for_graph
from upcycle.targets.onnx.torch_ops.opaque import OPAQUE
from upcycle.targets.onnx.trace import quiet, trace

# The leading axes of the example, all distinct and longer than 1, so that none is taken as fixed.
_SIZES = (2, 3, 5, 7, 11)
_NOTES = "pkg."  # begins the exporter's notes on a node


@dataclass(frozen=True)
class Place:
    """Where a layer goes: the tensor `x` that it reads, and the `output` that it replaces.

    `rank` and `dtype` (float32 or a narrower one) are those of `x`.
    """

    x: ir.Value
    output: ir.Value
    rank: int
    dtype: ir.DataType


def insert_layer(
    model: ir.Model, key: str, layer: MoE, tensors: Mapping[str, ir.Value], place: Place
) -> ir.Value:
    """Make what reads the output read a layer of `x`; the nodes between are left without use.

    The `layer`, whose name `key` is unique in the graph, may be on the meta device: `tensors` has
    its weights in float32 by their names in it, and those that are not in the graph become
    initializers. Returns the tensor in the place of the output, with its name.

    Raises:
        UnsupportedError: a graph cannot have the router of the layer.
    """
    exported = onnx.load_from_string(_exported(json.dumps(layer.config.to_json()), place.rank))
    inner = ir.from_proto(exported).graph
    n = Nodes(f"{key}/")
    narrow = place.dtype != ir.DataType.FLOAT
    x = n("Cast", place.x, to=ir.DataType.FLOAT.value, name="tokens") if narrow else place.x
    for value in list(inner.inputs):
        given = x if value.name == "x" else _registered(model, tensors[str(value.name)])
        ir.convenience.replace_all_uses_with(value, given)
    for value in list(inner.initializers.values()):  # constants of the layer's code
        name = f"{key}/{value.name}"
        constant = ir.Value(name=name, type=value.type, shape=value.shape)
        constant.const_value = value.const_value
        ir.convenience.replace_all_uses_with(value, _registered(model, constant))
    (made,) = inner.outputs
    nodes = list(inner)
    for i, node in enumerate(nodes):
        node.name = f"{key}/{node.op_type}_{i}"
        for value in node.outputs:
            value.name = f"{key}/{value.name}"
        if (node.domain, node.op_type) == OPAQUE:
            node.attributes["layer"] = ir.AttrString("layer", key)
        for note in [name for name in node.metadata_props if name.startswith(_NOTES)]:
            del node.metadata_props[note]
    inner.outputs.clear()
    inner.remove(nodes)
    after = Nodes(f"{key}/")
    y = after("Cast", made, to=place.dtype.value, name="output") if narrow else made
    _take_place(place.output, [*n.nodes, *nodes, *after.nodes], y)
    return y


@lru_cache(maxsize=64)
def _exported(config: str, rank: int) -> bytes:
    """The graph of a layer as a file; its parameters are inputs, by their names in the layer."""
    layer = empty_layer(LayerConfig.from_json(json.loads(config)))
    numbers = {  # one for each tensor, to need no memory: the exporter takes no meta tensors
        name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(numbers, assign=True)
    axis, d_model = layer.axis % rank, layer.experts.hidden_dim
    sizes = list(_SIZES[: rank - 1])
    sizes.insert(axis, d_model)
    x = torch.zeros(sizes)
    labels = {i: f"axis_{i}" for i in range(rank) if i != axis}
    with for_graph(layer):
        program = trace(layer, {"x": x}, {"x": labels}, optimize=False)
    model: ir.Model = program.model
    with quiet():
        common.InlinePass()(model)
        common.RemoveUnusedNodesPass()(model)
    graph, names = model.graph, set(layer.state_dict())
    for value in [v for v in graph.initializers.values() if v.name in names]:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    return bytes(ir.to_proto(model).SerializeToString())


def _registered(model: ir.Model, value: ir.Value) -> ir.Value:
    if value.producer() is None and value.name not in model.graph.initializers:
        model.graph.register_initializer(value)
    return value


def _take_place(old: ir.Value, nodes: list[ir.Node], new: ir.Value) -> None:
    """Put the nodes right after the one that made `old`, and give the new value its name."""
    producer = old.producer()
    assert producer is not None
    assert producer.graph is not None
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}/dense", old.name
    producer.graph.insert_after(producer, nodes)


def unique_keys(paths: Mapping[str, int]) -> dict[str, list[str]]:
    """Names for the layers of each path, given the number of places where it is applied."""
    return {
        path: [path if count == 1 else f"{path}.{i}" for i in range(count)]
        for path, count in paths.items()
    }
