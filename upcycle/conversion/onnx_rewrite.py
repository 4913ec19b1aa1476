"""Write a converted ONNX file; one layer is in memory at a time."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from upcycle.ir.layer_weights import empty_layer
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import MoEWeights
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.tensors import ONNX_TYPES
from upcycle.targets.files.stored import Stored
from upcycle.targets.files.tensor_file import TensorEntry, write_tensors
from upcycle.targets.onnx.forms.lower import lower
from upcycle.targets.onnx.forms.routed import Routed, routed
from upcycle.targets.onnx.insert import Place, insert_layer, unique_keys
from upcycle.targets.onnx.share_weights import Store, stored_value

FILE, DATA, EXPERTS = "model.onnx", "model.onnx.data", "experts"
INLINE_BYTES = 1 << 30  # of weights that were inside the file; a file of 2 GB cannot be written


def write_converted(
    source: OnnxSource,
    plan: Plan,
    directory: Path,
    *,
    made: Callable[[MoESpec], MoEWeights],
    beside: Path,
    max_shard_size: int,
) -> dict[str, Stored]:
    """Write ``model.onnx``; the graph of `source` is used up.

    Weights that were in external files, and are still used, go to ``model.onnx.data``.

    Args:
        made: gives the weights of a layer; called once for each, in the order of the plan.
        beside: for ``experts.safetensors``; if it is not `directory`, then what the file reads of
            it goes to ``model.onnx.data``, too.

    Returns:
        Where each tensor of the experts is in `beside`.
    """
    model, found = source.model, source.found
    layer_of = lru_cache(maxsize=1)(lambda index: made(plan.specs[index]))
    entries = [e for i, spec in enumerate(plan.specs) for e in _entries(spec, i, layer_of)]
    stored = write_tensors(beside, entries, max_shard_size=max_shard_size, stem=EXPERTS)
    keys = unique_keys({spec.ffn.path: len(found.regions[spec.ffn.path]) for spec in plan.specs})
    layers: dict[str, Routed] = {}
    replaced: dict[ir.Value, ir.Value] = {}
    for spec in plan.specs:
        layer, path = empty_layer(spec.layer_config()), spec.ffn.path
        names = {name: f"{path}.{name}" for name in layer.state_dict()}
        tensors = {n: stored_value(full, stored[full], beside) for n, full in names.items()}
        for key, region in zip(keys[path], found.regions[path], strict=True):
            x = replaced.get(region.x, region.x)  # the output of an FFN may be the input of one
            place = Place(x, region.output, region.rank, ONNX_TYPES[region.dtype])
            replaced[region.output] = insert_layer(model, key, layer, tensors, place)
            layers[key] = routed(layer)
    common.RemoveUnusedNodesPass()(model)
    lower(model, layers, Store(beside, {}), plan.recipe.onnx)
    common.RemoveUnusedNodesPass()(model)
    _keep_beside(model, directory)
    ir.save(model, directory / FILE)
    return stored


def _entries(spec: MoESpec, index: int, made: Callable[[int], MoEWeights]) -> Iterator[TensorEntry]:
    """The tensors of one layer, of which only the shapes are known yet."""
    for name, tensor in empty_layer(spec.layer_config()).state_dict().items():
        yield TensorEntry(
            f"{spec.ffn.path}.{name}",
            tuple(tensor.shape),
            tensor.dtype,
            lambda name=name: made(index).tensors()[name],  # type: ignore[misc]
        )


def _keep_beside(model: ir.Model, directory: Path) -> None:
    """Copy weights from the external files of the source, tensor by tensor."""
    values = [v for graph in model.graphs() for v in graph.initializers.values()]
    foreign, inline = [], []
    for value in values:
        tensor = value.const_value
        if value.dtype in (ir.DataType.UINT8, ir.DataType.INT8):  # rounded matrices
            foreign.append(value)
        elif not isinstance(tensor, ir.ExternalTensor):
            inline.append(value)
        elif Path(tensor.base_dir) != directory:
            foreign.append(value)
    sizes = [value.const_value.nbytes for value in inline if value.const_value is not None]
    if sum(sizes) > INLINE_BYTES:
        foreign += inline
    tensors = [value.const_value for value in foreign if value.const_value is not None]
    if not tensors:
        return
    written = ir.external_data.convert_tensors_to_external(tensors, directory, DATA)
    for value, tensor in zip(foreign, written, strict=True):
        value.const_value = tensor
