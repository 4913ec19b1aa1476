"""Write ``model.onnx`` for a converted model, beside the weights that it reads."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.verification_inputs import cast_floats
from upcycle.onnx.node_names import name_nodes
from upcycle.onnx.tensors import ONNX_TYPES
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.targets.files.stored import Stored
from upcycle.targets.onnx.axes import fixed_sizes, name_axes
from upcycle.targets.onnx.dtypes import narrowed, widen
from upcycle.targets.onnx.forms.lower import lower
from upcycle.targets.onnx.layers import for_graph, label, layers_of
from upcycle.targets.onnx.share_weights import Store, share_weights, write_weights
from upcycle.targets.onnx.trace import quiet, trace
from upcycle.targets.traced.arguments import apart, arguments_of, identifiers
from upcycle.targets.traced.axes import Axes, default_axes
from upcycle.targets.traced.outputs import as_python, named_tensors, tensor_outputs
from upcycle.targets.traced.parts import Compute

log = logging.getLogger(__name__)


def export_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    path: Path,
    stored: Mapping[str, Stored],
    dynamic: Axes | None = None,
    compute: Compute | None = None,
    options: Onnx = ONNX_DEFAULTS,
) -> Path:
    """Write an ONNX file whose weights are the tensors that `stored` describes.

    The graph computes what `model` computes in eval mode, up to rounding; its inputs and outputs
    are named as the arguments of the model and the fields that it returns. Weights that are found
    on disk are read from there, also transposed or from a narrower type; the rest goes to
    ``<path>.data``, with a warning in the log.

    Args:
        model: any module, float32, with `upcycle.layers.moe.MoE` layers in it; it is left as it
            was.
        example_inputs: every dynamic axis longer than 1; numbers, flags and words among them become
            constants of the graph, and tensors inside of one argument inputs, ``obs.a``.
        path: the file to write, and what is returned; files of `stored` are relative to its folder.
        dynamic: names of the axes that must vary. Default: `default_axes`, where they can.
        compute: what the graph computes instead of `model.forward`, which it gets together with
            the inputs; then these are tensors by name, and any name will do.
        options: the form of the layers and the type of the graph, in which only routers stay in
            float32. A file in another type, or with rounded weights, holds its weights itself, in
            ``<path>.data``.

    Raises:
        UnsupportedError: the model cannot be exported, or not with these dynamic axes.
    """
    start, model = time.perf_counter(), as_python(model)
    kind: torch.dtype = getattr(torch, options.half or "float32")
    if options.half:
        model, example_inputs = narrowed(model, kind), cast_floats(example_inputs, kind)
    if compute is None:
        given = arguments_of(model, example_inputs)
        example_inputs, compute = given.tensors, given.call
    assert isinstance(example_inputs, Mapping)
    axes = default_axes(example_inputs) if dynamic is None else dynamic
    words = dict(zip(example_inputs, identifiers(list(example_inputs)), strict=True))
    store = Store(path.parent, stored)
    layers = layers_of(model, kind)
    with for_graph(model), tensor_outputs(model, compute, words) as outputs:
        program = trace(
            model,
            {word: example_inputs[name] for name, word in words.items()},
            {word: axes[name] for name, word in words.items() if name in axes},
        )
    if not outputs:  # torch.export read the code of the forward and did not run it
        with torch.no_grad():
            outputs = list(named_tensors(compute(model, dict(example_inputs))))
    graph: ir.Model = program.model
    label(graph, layers)
    _rename(graph, graph.graph.inputs, list(words))
    if kind is torch.float32:
        widen(graph)
    name_axes(graph, axes, fixed_sizes(program), required=dynamic is not None)
    lower(graph, layers, store, options, dtype=ONNX_TYPES[kind])
    with quiet():
        common.RemoveUnusedNodesPass()(graph)
    _rename(graph, graph.graph.outputs, apart(outputs, words))
    if options.half or options.rounds:
        missing = write_weights(graph, path)
    else:
        missing = share_weights(graph, store, path)
    name_nodes(graph, layers)
    _tidy(graph)
    ir.save(graph, path)
    onnx.checker.check_model(path, full_check=True)
    log.info(
        "%s: %d MoE layers, %d bytes, %d tensors not on disk, %.1f s",
        *(path.name, len(layers), path.stat().st_size, missing, time.perf_counter() - start),
    )
    return path


def _rename(model: ir.Model, values: Sequence[ir.Value], names: Sequence[str]) -> None:
    """Give inputs or outputs of the graph their names, which nothing else inside keeps."""
    for value in (o for node in model.graph for o in node.outputs):
        if value.name in names:
            value.name = f"{value.name}/inner"
    for value, name in zip(values, names, strict=True):
        value.name = name


def _tidy(model: ir.Model) -> None:
    """Count the axes of GatherElements from the front: onnx's evaluator misreads -1."""
    for node in model.graph.all_nodes():
        if node.op_type == "GatherElements" and node.inputs[0] is not None:
            axis, shape = node.attributes.get_int("axis", 0), node.inputs[0].shape
            if axis < 0 and shape is not None:
                node.attributes["axis"] = ir.AttrInt64("axis", axis + len(shape))
    model.producer_name, model.producer_version = "upcycle", None
