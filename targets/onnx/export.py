"""Write ``model.onnx`` for a converted model, beside the weights that it reads."""

import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor, nn

from upcycle.errors import UnsupportedError
from upcycle.targets.onnx.external import Store, share_weights
from upcycle.targets.onnx.forms import Form, Gelu
from upcycle.targets.onnx.lower import SCOPES, lower
from upcycle.targets.onnx.nodes import OPSET
from upcycle.targets.onnx.symbolic import symbolic_layers, tensor_outputs
from upcycle.targets.stored import Stored

log = logging.getLogger(__name__)

Axes = Mapping[str, Mapping[int, str]]


def export_onnx(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...],
    *,
    path: Path,
    stored: Mapping[str, Stored],
    dynamic: Axes | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    form: Form = "fused",
    gelu: Gelu = "exact",
    strict: bool = False,
) -> Path:
    """Write an ONNX file whose weights are the tensors that `stored` describes.

    The graph computes what `model` computes in eval mode, up to rounding. Weights that are found
    on disk are read from there, also transposed or from a narrower type; the rest goes to
    ``<path>.data``, with a warning in the log.

    Args:
        model: any module, float32, with `upcycle.moe.MoE` layers in it; it is left as it was.
        example_inputs: arguments by name, or in order; every dynamic axis longer than 1.
        path: the file to write; files of `stored` are relative to its folder.
        stored: the tensors that are on disk.
        dynamic: names of the axes that may vary, by input and axis. Default: axis 0 is ``batch``,
            and axis 1 of token ids, masks and [batch, sequence, width] tensors is ``sequence``,
            or ``decoder_sequence`` for inputs of a decoder.
        input_names, output_names: names in the graph; default: those of the model's arguments and
            of the fields that it returns.
        form: ``fused`` uses the kernel ``com.microsoft::MoE`` where it computes the layer;
            ``unrolled`` never does: standard operations, faster on CPU from about 256 tokens.
        gelu: ``tanh`` accepts the fused kernel's tanh form for erf GELU (about 1e-3 of the output).
        strict: raise UnsupportedError if a tensor is not on disk.

    Returns:
        `path`.

    Raises:
        UnsupportedError: the model cannot be exported, or not with these dynamic axes.
    """
    start = time.perf_counter()
    named = _named(model, example_inputs)
    axes = _default_axes(named) if dynamic is None else dynamic
    store = Store(path.parent, stored)
    with symbolic_layers(model) as layers, tensor_outputs(model) as names:
        program = _trace(model, example_inputs, named, axes)
        outputs = list(output_names or names)
    graph: ir.Model = program.model
    _name_axes(graph, axes, _fixed(program), required=dynamic is not None)
    lower(graph, layers, store, form=form, gelu=gelu)
    with _quiet():
        common.RemoveUnusedNodesPass()(graph)
    _rename(graph, list(input_names or []), outputs)
    missing = share_weights(graph, store, path, strict=strict)
    _tidy(graph)
    ir.save(graph, path)
    onnx.checker.check_model(path, full_check=True)
    log.info(
        "%s: %d MoE layers, %d bytes, %d tensors not on disk, %.1f s",
        *(path.name, len(layers), path.stat().st_size, missing, time.perf_counter() - start),
    )
    return path


def _named(
    model: nn.Module, inputs: Mapping[str, Tensor] | tuple[Tensor, ...]
) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return dict(zip(signature(model.forward).parameters, inputs, strict=False))


def _default_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in inputs.items():
        axes[name] = {0: "batch"} if tensor.dim() > 0 else {}
        if tensor.dim() == (3 if tensor.is_floating_point() else 2):
            axes[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return axes


def _trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...],
    named: Mapping[str, Tensor],
    axes: Axes,
) -> torch.onnx.ONNXProgram:
    shapes = {name: dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) for name in named}
    arguments: dict[str, Any] = (
        {"kwargs": dict(inputs), "dynamic_shapes": shapes}
        if isinstance(inputs, Mapping)
        else {"args": inputs, "dynamic_shapes": tuple(shapes.values())}
    )
    with _quiet(), _no_fast_path():
        try:
            program = torch.onnx.export(
                model, dynamo=True, opset_version=OPSET, verbose=False, **arguments
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UnsupportedError(f"torch.onnx cannot export this model: {reason}") from error
    assert program is not None
    return program


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep torch's fused transformer layer, which reads the FFN's weights, out of the graph."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporter says about itself: deprecations, and packages it does without."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", module=r"torch\.|onnxscript\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fixed(program: torch.onnx.ONNXProgram) -> dict[str, int]:
    """The symbols that have one value only: the graph shows them as if they could vary."""
    assert program.exported_program is not None
    ranges = program.exported_program.range_constraints
    return {str(s): int(r.lower) for s, r in ranges.items() if r.lower == r.upper}


def _name_axes(model: ir.Model, axes: Axes, fixed: Mapping[str, int], *, required: bool) -> None:
    """Name the dynamic axes, and refuse those that the model does not let vary."""
    renamed: dict[str, str | int] = dict(fixed)
    for value in model.graph.inputs:
        for axis, label in axes.get(str(value.name), {}).items():
            assert value.shape is not None
            size = value.shape[axis]
            only = size if isinstance(size, int) else fixed.get(str(size.value))
            if only is None and not isinstance(size, int):
                renamed.setdefault(str(size.value), label)
                continue
            problem = f"axis {axis} ({label}) of input {value.name} can only be {only}"
            if required:
                raise UnsupportedError(f"{problem}: the model's code depends on it")
            log.warning("%s", problem)
    _rename_axes(model, renamed)


def _rename_axes(model: ir.Model, renamed: Mapping[str, str | int]) -> None:
    """Put names for the exporter's symbols, also inside products such as ``s31*s81``."""
    values = [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                label = re.sub(r"\w+", lambda m: str(renamed.get(m[0], m[0])), str(size.value))
                value.shape[axis] = int(label) if label.isdigit() else label


def _rename(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    graph = model.graph
    wanted = {id(v): n for v, n in zip(graph.inputs, inputs, strict=False)}
    wanted |= {id(v): n for v, n in zip(graph.outputs, outputs, strict=False)}
    inner = [o for node in graph for o in node.outputs if id(o) not in wanted]
    for value in inner:
        if value.name in wanted.values():
            value.name = f"{value.name}/inner"
    for value in (*graph.inputs, *graph.outputs):
        value.name = wanted.get(id(value), value.name)


def _tidy(model: ir.Model) -> None:
    """Drop stack traces, which are most of the file and hold paths of this machine.

    Also count the axes of GatherElements from the front: onnx's evaluator misreads -1.
    """
    for node in model.graph.all_nodes():
        if node.op_type == "GatherElements" and node.inputs[0] is not None:
            axis, shape = node.attributes.get_int("axis", 0), node.inputs[0].shape
            if axis < 0 and shape is not None:
                node.attributes["axis"] = ir.AttrInt64("axis", axis + len(shape))
        for key in set(node.metadata_props) - {SCOPES}:
            del node.metadata_props[key]
    for value in model.graph.inputs:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "upcycle", None
