"""Shapes of the tensors of a foreign graph, with a small number for each dynamic axis."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx
import onnx_ir as ir

Shape = tuple[int, ...]
# For the dynamic axes in their order: distinct, so that no two are taken for each other.
_SIZES = (2, 11, 7, 5, 13, 3)
_IMAGE = 224  # rows and columns of a [batch, channels, rows, columns] input
_BIG = 1024  # elements; larger weights have nothing to tell about shapes


def axis_sizes(model: ir.Model) -> dict[str, Shape]:
    """A full shape for each input of the graph.

    Axes of one name get one size; a sum of names, as in ``past + sequence``, the sum. The past of
    a cache is empty.
    """
    sizes: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    unnamed = 0
    for value in model.graph.inputs:
        dims: list[int | str] = []
        for axis, size in enumerate(value.shape or ()):
            label = size if isinstance(size, int) else size.value
            if label is None or label == "" or (isinstance(label, int) and label < 0):
                label, unnamed = f"axis_{unnamed}", unnamed + 1
            if isinstance(label, str) and len(value.shape or ()) == 4 and axis > 1:
                is_image = value.dtype is not None and value.dtype.is_floating_point()
                if is_image and "past" not in f"{label} {value.name}":
                    sizes.setdefault(label, _IMAGE)
            dims.append(label)
        shapes[str(value.name)] = tuple(
            dim if isinstance(dim, int) else _evaluate(dim, sizes) for dim in dims
        )
    return shapes


def _evaluate(label: str, sizes: dict[str, int]) -> int:
    names = re.findall(r"[A-Za-z_]\w*", label)
    if len(names) < 2 and "+" not in label:
        if label not in sizes:
            taken = sum(size in _SIZES for size in sizes.values())
            is_past = label.startswith("past")
            sizes[label] = 0 if is_past else _SIZES[min(taken, len(_SIZES) - 1)]
        return sizes[label]
    parts = [part.strip() for part in label.split("+")]
    return sum(int(part) if part.isdigit() else _evaluate(part, sizes) for part in parts if part)


@dataclass(frozen=True)
class Inferred:
    """Shapes and element types of the tensors that onnx can infer, by name."""

    shapes: Mapping[str, Shape]
    types: Mapping[str, ir.DataType]


def infer(model: ir.Model, inputs: Mapping[str, Shape]) -> Inferred:
    """What onnx infers of the tensors inside, for these shapes of the inputs."""
    proto = _without_weights(model)
    sizes = {
        str(axis.value): size
        for value in model.graph.inputs
        for axis, size in zip(value.shape or (), inputs[str(value.name)], strict=True)
        if not isinstance(axis, int) and axis.value
    }
    for value in chain(proto.graph.input, proto.graph.output, proto.graph.value_info):
        if value.type.HasField("tensor_type"):
            _fix(value, inputs.get(value.name), sizes)
    with contextlib.suppress(onnx.shape_inference.InferenceError):  # what the file says is left
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    shapes: dict[str, Shape] = {}
    types: dict[str, ir.DataType] = {}
    for value in chain.from_iterable(_values(proto.graph)):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types[value.name] = ir.DataType(tensor.elem_type)
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return Inferred(shapes, types)


def _values(graph: onnx.GraphProto) -> Iterator[Sequence[onnx.ValueInfoProto]]:
    """Those of the graph, and of what is inside its nodes."""
    yield from (graph.input, graph.output, graph.value_info)
    for inner in chain.from_iterable(map(subgraphs, graph.node)):
        yield from _values(inner)


def fixed_size(value: ir.Value, axis: int) -> int:
    """The size of an axis that cannot vary."""
    size = value.shape[axis] if value.shape is not None else None
    assert isinstance(size, int)
    return size


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches and bodies that are attributes of a node."""
    graphs = []
    for attribute in node.attribute:
        graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    return graphs


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The graph with its large initializers as inputs, so that no weight is copied."""
    large = [v for v in model.graph.initializers.values() if _elements(v) > _BIG]
    tensors = [(value, value.const_value) for value in large]
    try:
        for value in large:
            del model.graph.initializers[str(value.name)]
            model.graph.inputs.append(value)
        return ir.to_proto(model)
    finally:
        for value, tensor in tensors:
            model.graph.inputs.remove(value)
            value.const_value = tensor
            model.graph.register_initializer(value)


def _elements(value: ir.Value) -> int:
    if value.const_value is None:
        return 0
    if value.shape is None:
        value.shape = ir.Shape(value.const_value.shape.numpy())
    if value.type is None:
        value.type = ir.TensorType(value.const_value.dtype)
    return int(value.const_value.size)


def _fix(value: onnx.ValueInfoProto, shape: Shape | None, sizes: Mapping[str, int]) -> None:
    """Put numbers for the names of axes; a name that no input has becomes unknown."""
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if shape is not None:
            dim.dim_value = shape[axis]
        elif dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
        elif not dim.HasField("dim_value"):
            dim.Clear()
