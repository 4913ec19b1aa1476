"""Locate the FFNs of an ONNX graph, and where in the graph each of them is."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import fx

from upcycle.capture.recorder import Program
from upcycle.ir.ffn import FFN, Located, Miss
from upcycle.onnx.shapes import axis_sizes, infer
from upcycle.onnx.tensors import tensor_of
from upcycle.passes.locate.linear import linear_map
from upcycle.passes.locate.locate import locate
from upcycle.passes.locate.region import output_of
from upcycle.passes.locate.trace import trace
from upcycle.passes.locate_onnx.fused import drop, put_in
from upcycle.passes.locate_onnx.operations import OPERATIONS
from upcycle.passes.locate_onnx.program import Parameter, Reader
from upcycle.util.lazy_tensors import LazyTensors

SHARED = (
    "its linear maps also compute something else (a fused projection of attention and MLP): "
    "convert the model that the file was exported from"
)


@dataclass(frozen=True)
class Region:
    """A place in the graph where an FFN is applied: from the tensor `x` to the tensor `output`.

    The names stay those of the tensors that a conversion puts in their place. `rank` and `dtype`
    are those of `x`. What is `inside` a branch or a body cannot be an output of the file.
    """

    x: ir.Value
    output: ir.Value
    x_name: str
    output_name: str
    rank: int
    dtype: torch.dtype
    inside: bool


@dataclass(frozen=True)
class OnnxLocated:
    """What was found in a graph: the FFNs, their places by path, and their weights by name.

    `program` is the graph as it was read.
    """

    program: Program
    located: Located
    regions: Mapping[str, tuple[Region, ...]]
    parameters: Mapping[str, Parameter]
    weights: LazyTensors


def locate_in_onnx(model: ir.Model) -> OnnxLocated:
    """All FFNs and near misses of a graph of `open_graph`, in its order; no weight is read."""
    reader = Reader(model, infer(model, axis_sizes(model)), OPERATIONS)
    found = locate(reader.program)
    ffns = tuple(
        replace(ffn, path=ffn.path or ffn.contraction.module, placement="inline")
        for ffn in found.ffns
        if not ffn.shared
    )
    paths = {node.name: str(node.meta.get("path")) for node in reader.graph.nodes}
    misses = [
        replace(miss, reason=_reason(miss, (miss.path, paths.get(miss.node, "")), reader.refused))
        for miss in found.misses
    ]
    misses += [Miss(ffn.contraction.module, SHARED) for ffn in found.ffns if ffn.shared]
    regions = {ffn.path: tuple(_regions(reader.graph, ffn, model.graph)) for ffn in ffns}
    regions = _put_in(reader, regions)
    parameters = reader.parameters
    weights = LazyTensors(parameters, lambda name: _read(name, parameters[name]))
    located = Located(ffns, tuple(misses))
    return OnnxLocated(reader.program, located, regions, parameters, weights)


def _put_in(
    reader: Reader, regions: Mapping[str, tuple[Region, ...]]
) -> dict[str, tuple[Region, ...]]:
    """Spell out in the graph the nodes that an FFN ends inside of; all others stay as they are."""
    ends = {region.output.producer() for found in regions.values() for region in found}
    renamed: dict[ir.Value, ir.Value] = {}
    for node, parts in reader.spelled.items():
        if ends.isdisjoint(parts):
            drop(parts)
        else:
            renamed[node.outputs[0]] = put_in(node, parts)
    return {
        path: tuple(replace(region, x=renamed.get(region.x, region.x)) for region in found)
        for path, found in regions.items()
    }


def _read(name: str, parameter: Parameter) -> torch.Tensor:
    tensor = ir.convenience.get_const_tensor(parameter.value)
    found = tensor_of(ir.Value(name=name, const_value=tensor))
    if found is None:
        raise KeyError(name)
    if found.dtype in (torch.float16, torch.bfloat16):  # the layers compute in float32
        found = found.float()
    return found.reshape(parameter.shape)


def _reason(miss: Miss, paths: Iterable[str], refused: Mapping[str, str]) -> str:
    for path in paths:
        if path in refused:
            return refused[path]
    if "only a part is the FFN's" in miss.reason:  # a bias is always a node of its own here
        return SHARED
    return re.sub(r"in the forward \([^)]*\).*", "in the graph: fold its constants first",
                  miss.reason)  # fmt: skip


def _regions(graph: fx.Graph, ffn: FFN, main: ir.Graph) -> Iterator[Region]:
    for node in graph.nodes:
        contraction = linear_map(node)
        if contraction is None or contraction.weight != ffn.contraction.weight:
            continue
        x = trace(contraction.x, contraction.axis).expansions[0].linear.x
        output, _ = output_of(contraction)
        value, out = x.meta["value"], output.meta["value"]
        rank, dtype = len(x.meta["shape"]), x.meta["dtype"]
        producer = out.producer()
        inside = producer is not None and producer.graph is not main
        yield Region(value, out, str(value.name), str(out.name), rank, dtype, inside)
