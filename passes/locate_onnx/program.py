"""An ONNX graph as a `Program`, so that the same pass locates FFNs in files and in modules.

Each node becomes the torch call of the same meaning, or an opaque call that keeps the reader of a
tensor visible. Shapes come from onnx; where it does not know an operation, from the torch call on
meta tensors; and the data of a linear map of unknown shape may have any, because an FFN does not
depend on it.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from upcycle.capture.recorder import Call, Program, op_name, opaque_call
from upcycle.onnx.shapes import Inferred
from upcycle.onnx.tensors import TORCH_TYPES
from upcycle.passes.locate_onnx.fused import spelled_out
from upcycle.passes.locate_onnx.names import (
    TORCH_NAMES,
    added_weights,
    label_of,
    path_of,
    subgraphs,
)
from upcycle.passes.locate_onnx.origins import Origins

STANDARD = ("", "ai.onnx")


class NoTorchCallError(Exception):
    """A node has no torch call of the same meaning here."""


@dataclass(frozen=True)
class Parameter:
    """A stored tensor, the shape in which it is read, and the type in which it is stored."""

    value: ir.Value
    shape: tuple[int, ...]
    dtype: ir.DataType


Translation = Callable[["Reader", ir.Node], fx.Node | dict[ir.Value, fx.Node]]


class Reader:
    """Translates the graph of an ONNX model, node by node.

    Attributes:
        program: its nodes; ``meta["value"]`` is the ONNX tensor.
        parameters: what is behind each parameter name. A bias that several linear maps read has a
            name for each of them.
        refused: path of a linear map that cannot be converted -> why.
        path: of the module that the node in translation is from.
        origins: what the tensors come from.
        spelled: a node of the graph -> those of `spelled_out`, which were read in its place.
    """

    def __init__(
        self,
        model: ir.Model,
        inferred: Inferred,
        operations: Mapping[tuple[str, str], Translation],
    ) -> None:
        """Translate all of `model`, which is at a recent opset and has no functions.

        `operations` translates a node by its domain and type; all others are opaque.
        """
        self.graph = fx.Graph()
        self.program = Program(self.graph)
        self.parameters: dict[str, Parameter] = {}
        self.refused: dict[str, str] = {}
        self.path = ""
        self.origins = Origins()
        self.spelled: dict[ir.Node, list[ir.Node]] = {}
        self._operations = operations
        self._shapes, self._types = inferred.shapes, inferred.types
        self._nodes: dict[ir.Value, fx.Node] = {}
        self._names: dict[tuple[ir.Value, str], str] = {}
        self._owner: dict[str, str] = {}  # path of a linear map -> its weight
        self._made: dict[Any, torch.Tensor] = {}  # a call on shapes -> what torch makes of them
        for value in model.graph.inputs:
            self._bind(value, self.graph.placeholder(str(value.name)))
        self._read_all(model.graph)
        self.graph.output(tuple(self.node_of(value) for value in model.graph.outputs))

    def _read_all(self, graph: ir.Graph) -> None:
        """Add the nodes of a graph in their order, those of its subgraphs before their node."""
        for node in graph:
            for inner in subgraphs(node):
                for value in inner.inputs:
                    self._bind(value, self.opaque(f"input of {node.op_type}"))
                self._read_all(inner)
            self._read(node)

    def _read(self, node: ir.Node) -> None:
        """Add `node`; every output of it has a node afterwards."""
        if node.op_type == "Constant" and node.domain in STANDARD:
            return
        if parts := spelled_out(node):
            for part in parts:
                self._read(part)
            self.spelled[node] = parts
            self._bind(node.outputs[0], self.node_of(parts[-1].outputs[0]))
            return
        self.origins.note(node)
        self.path = path_of(node)
        domain = "" if node.domain in STANDARD else node.domain
        translate = self._operations.get((domain, node.op_type))
        results: dict[ir.Value, fx.Node] = {}
        if translate is not None:
            with suppress(NoTorchCallError, RuntimeError, TypeError, ValueError, IndexError):
                # Fails for an option that torch's call lacks, or an invalid shape.
                made = translate(self, node)
                results = made if isinstance(made, dict) else {node.outputs[0]: made}
        if not all(self._fits(value, result) for value, result in results.items()):
            results = {}
        name = TORCH_NAMES.get(node.op_type, node.op_type)
        for value in node.outputs:
            if value not in results:
                results[value] = self.opaque(name, *self._all_inputs(node))
        for value, result in results.items():
            self._bind(value, result)

    def _fits(self, value: ir.Value, node: fx.Node) -> bool:
        known = self._shapes.get(str(value.name))
        return known is None or not node.meta["known"] or known == node.meta["shape"]

    def _all_inputs(self, node: ir.Node) -> list[fx.Node]:
        """What it reads: its inputs, and what its subgraphs return to it."""
        values = [value for value in node.inputs if value is not None]
        for graph in subgraphs(node):
            values += list(graph.outputs)
        return [self.node_of(value) for value in dict.fromkeys(values)]

    def _bind(self, value: ir.Value, node: fx.Node) -> None:
        """Let `node` stand for the tensor `value`."""
        shape = self._shapes.get(str(value.name))
        if "shape" not in node.meta or not node.meta["known"]:
            node.meta.update(shape=shape or (), known=shape is not None)
        dtype = value.dtype or self._types.get(str(value.name))
        if dtype is not None:
            node.meta["dtype"] = TORCH_TYPES.get(dtype, torch.float32)
        node.meta["typed"] = dtype is not None
        node.meta.setdefault("dtype", torch.float32)
        node.meta.setdefault("path", self.path)
        node.meta["value"] = value
        self._nodes[value] = node
        self._note_call(node)

    def _note_call(self, node: fx.Node) -> None:
        """Nodes of a path count as calls of its own; paths are in the order of the graph."""
        path = node.meta["path"]
        parts = path.split(".")
        for i in range(1, len(parts)):
            self.program.calls.setdefault(".".join(parts[:i]), [])
        self.program.calls.setdefault(path, []).append(Call((), (node,)))

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a torch call; its shape is what torch makes of it on meta tensors.

        Raises:
            NoTorchCallError: the shape of an argument is not known.
        """

        def meta(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            if not arg.meta["known"]:
                raise NoTorchCallError(op_name(target))
            return torch.empty(arg.meta["shape"], dtype=arg.meta["dtype"], device="meta")

        out = self._result(target, [meta(arg) for arg in args], kwargs)
        node = self.graph.create_node("call_function", target, args, kwargs, name=op_name(target))
        node.meta.update(shape=tuple(out.shape), dtype=out.dtype, path=self.path, known=True)
        self._note_call(node)
        return node

    def _result(
        self, target: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """What torch makes of meta tensors; equal calls, as of equal layers, are made once."""
        described = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else repr(a) for a in args]
        key = (target, *described, repr(kwargs))
        if key not in self._made:
            self._made[key] = target(*args, **kwargs)
        return self._made[key]

    def opaque(self, name: str, *args: fx.Node, shape: tuple[int, ...] | None = None) -> fx.Node:
        """Add a call that the analysis does not look into."""
        node = self.graph.create_node("call_function", opaque_call(name), args, {}, name=name)
        node.meta.update(shape=shape or (), known=shape is not None, path=self.path)
        node.meta["dtype"] = torch.float32
        return node

    def node_of(self, value: ir.Value) -> fx.Node:
        """The node of a tensor.

        Raises:
            NoTorchCallError: nothing that was read makes the tensor.
        """
        source = self.origins.source_of(value)
        tensor = ir.convenience.get_const_tensor(source)
        if tensor is not None:
            return self._parameter(str(source.name), source, tensor, _shape_of(tensor))
        if source not in self._nodes:
            raise NoTorchCallError(str(value.name))
        return self._nodes[source]

    def matrix(self, value: ir.Value) -> fx.Node:
        """The node of a weight; a stored one loses axes of length one in front of a matrix."""
        source = self.origins.source_of(value)
        tensor = ir.convenience.get_const_tensor(source)
        shape = () if tensor is None else _shape_of(tensor)
        if tensor is None or len(shape) < 3 or math.prod(shape[:-2]) != 1:
            return self.node_of(value)
        return self._parameter(str(source.name), source, tensor, shape[-2:])

    def first_input(self, node: ir.Node) -> fx.Node:
        """The node of the first input, which is there."""
        first = node.inputs[0]
        if first is None:
            raise NoTorchCallError(node.op_type)
        return self.node_of(first)

    def per_neuron(self, value: ir.Value, owner: str) -> fx.Node:
        """The node of an operand of a pointwise operation; a stored row counts as a vector.

        `owner` is the weight of the linear map that the other operand comes from. Exporters store
        equal biases once; each map gets its own name for it.
        """
        source = self.origins.source_of(value)
        tensor = ir.convenience.get_const_tensor(source)
        if tensor is None:
            return self.node_of(source)
        shape = _shape_of(tensor)
        if math.prod(shape[:-1]) == 1:
            shape = shape[-1:]
        if (source, owner) not in self._names:
            taken = any(known is source for known, _ in self._names)
            name = f"{source.name} of {owner}" if taken else str(source.name)
            self._names[source, owner] = name
        return self._parameter(self._names[source, owner], source, tensor, shape)

    def _parameter(
        self, name: str, source: ir.Value, tensor: ir.TensorProtocol, shape: tuple[int, ...]
    ) -> fx.Node:
        self.parameters[name] = Parameter(source, shape, tensor.dtype)
        node = self.graph.create_node("get_attr", name)
        node.meta.update(shape=shape, known=True, parameter=name, path=self.path, value=source)
        node.meta["dtype"] = TORCH_TYPES.get(tensor.dtype, torch.float32)
        return node

    def unknown_number(self) -> fx.Node:
        """A number that is no parameter, and that no walk looks behind."""
        node = self.graph.create_node("get_attr", "constant")
        node.meta.update(shape=(), known=True, parameter="", path=self.path, dtype=torch.float32)
        return node

    def data(self, value: ir.Value, weight: fx.Node, width: int, rank: int = 3) -> fx.Node:
        """The node of the data of a linear map; if its shape is not known, it may be any."""
        node = self.node_of(value)
        if not node.meta.get("typed"):
            node.meta["dtype"] = weight.meta["dtype"]
        if not node.meta["known"]:
            node.meta.update(shape=(*(2, 3)[3 - rank :], width), known=True)
        return node

    def shape_of(self, value: ir.Value) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            NoTorchCallError: onnx cannot infer it.
        """
        shape = self._shapes.get(str(value.name))
        if shape is None:
            raise NoTorchCallError("a shape that is not known")
        return shape

    def claim_path(self, value: ir.Value, node: ir.Node) -> None:
        """Make `path` the own path of the linear map `node`, whose weight is `value`."""
        weight = str(self.origins.source_of(value).name)
        if not self.path:
            named = next((n for n in (weight, *added_weights(node)) if "." in n), "")
            self.path = named.rpartition(".")[0]
        name = label_of(node)
        self.path = self.path or name
        if self._owner.setdefault(self.path, weight) != weight:
            self.path = f"{self.path}.{name.rpartition('.')[2]}"
            self._owner.setdefault(self.path, weight)


def _shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())
