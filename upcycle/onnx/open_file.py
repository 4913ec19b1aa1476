"""Reading an ONNX file of any origin, and bringing it to the opset of our nodes.

Weights in external files are not read: onnx_ir maps them when they are asked for.
"""

import logging
from collections.abc import Set
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.version_converter import ConvertVersionPass

from upcycle.errors import UnsupportedError, UsageError, first_line
from upcycle.onnx.nodes import OPSET
from upcycle.onnx.shapes import subgraphs
from upcycle.util.quiet import quiet_logs

MIN_OPSET = 11  # below it the version converter lacks adapters for common operations
STANDARD = ("", "ai.onnx")


def open_graph(path: Path) -> ir.Model:
    """The graph of an ONNX file at opset `OPSET` or later, without functions.

    Initializers that are also inputs of the graph, as files before IR version 4 have them, become
    plain initializers; those of subgraphs move to the main graph. No two tensors have one name,
    wherever they are.

    Raises:
        UsageError: the file is no ONNX file, its graph is broken, or external data is missing.
        UnsupportedError: its opset is too old, or it cannot be converted to a newer one.
    """
    proto = read_proto(path)
    version = _opset(path, proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises types of its own, and KeyErrors, for broken graphs
        raise UsageError(f"{path}: the graph is not valid: {_root(error)}") from error
    _check_external(path, model)
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent.absolute())
    del proto
    with quiet_logs("onnxscript", "onnx_ir", level=logging.CRITICAL):  # advice to its own callers
        common.RemoveInitializersFromInputsPass()(model)
        if model.functions:
            try:
                common.InlinePass()(model)
            except Exception as error:  # onnx_ir's own types: a function that calls itself
                raise UsageError(f"{path}: its functions are not valid: {_root(error)}") from error
        if version < OPSET:
            _raise_opset(path, model, version)
        _name_apart(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
    return model


def read_proto(path: Path) -> onnx.ModelProto:
    """The file without external data.

    Raises:
        UsageError: the file is no ONNX file, or its graph is broken.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own type
        raise UsageError(f"{path}: not an ONNX file, or a truncated one") from error
    if not proto.ir_version or not proto.graph.node or not proto.opset_import:
        raise UsageError(f"{path}: not an ONNX file, or an empty one")
    _check_order(path, proto.graph)
    return proto


def check_graph(path: Path) -> str:
    """What ``onnx.checker`` has against a file, with inferred shapes; empty if nothing."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return first_line(error)
    return ""


def _opset(path: Path, proto: onnx.ModelProto) -> int:
    versions = [o.version for o in proto.opset_import if o.domain in STANDARD]
    if not versions:
        return OPSET  # nothing but operations of other domains
    if versions[0] < MIN_OPSET:
        raise UnsupportedError(
            f"{path}: its opset is {versions[0]}, and {MIN_OPSET} is the oldest that can be "
            "converted; export the model again with a newer one"
        )
    newest = onnx.defs.onnx_opset_version()
    if versions[0] > newest:
        raise UnsupportedError(
            f"{path}: its opset is {versions[0]}, and onnx here knows {newest}; update onnx"
        )
    return int(versions[0])


def _check_order(path: Path, graph: onnx.GraphProto, outside: Set[str] = frozenset()) -> None:
    """Every tensor must be made once, before it is read: so a graph has no cycle.

    A subgraph also reads what was made `outside` of it. By hand: a topological sort would accept
    nodes in any order, and would not name the tensor that is wrong.
    """
    broken = f"{path}: the graph is not valid:"
    made = {value.name for value in (*graph.input, *graph.initializer)} | outside
    made |= {tensor.values.name for tensor in graph.sparse_initializer}
    later = {output for node in graph.node for output in node.output}
    for node in graph.node:
        for name in (name for name in node.input if name and name not in made):
            why = "before it is made, or in a cycle" if name in later else "and nothing makes it"
            raise UsageError(f"{broken} the {node.op_type} node {node.name!r} reads {name!r} {why}")
        for inner in subgraphs(node):
            _check_order(path, inner, made)
        for name in filter(None, node.output):
            if name in made:
                raise UsageError(f"{broken} the tensor {name!r} is made twice")
            made.add(name)
    if lost := [value.name for value in graph.output if value.name not in made]:
        raise UsageError(f"{broken} nothing makes its output {lost[0]!r}")


def _name_apart(model: ir.Model) -> None:
    """Rename tensors in subgraphs: the two branches of an If may use the same names.

    By hand: NameFixPass of onnx_ir leaves those alone, and also renames nodes.
    """
    taken: set[str] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        made = [*graph.inputs, *graph.initializers.values()]
        made += [value for node in graph for value in node.outputs]
        for value in (value for value in made if value.name):
            name, count = str(value.name), 0
            while value.name in taken:
                count += 1
                value.name = f"{name}/{count}"
            taken.add(str(value.name))


def _check_external(path: Path, model: ir.Model) -> None:
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    for tensor in (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)):
        location = Path(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise UsageError(
                f"{path}: its weight {tensor.name} is said to be in {tensor.location}, outside the "
                "folder of the file"
            )
        data, file = f"{path}: its external data {tensor.location} is", path.parent / location
        if not file.is_file():
            raise UsageError(f"{data} missing; put the file beside it")
        if file.stat().st_size < (tensor.offset or 0) + (tensor.length or tensor.nbytes):
            raise UsageError(
                f"{data} too short for {tensor.name}; it is truncated, or of another model"
            )


def _raise_opset(path: Path, model: ir.Model, version: int) -> None:
    reason = _unknown_operation(model)
    try:
        ConvertVersionPass(target_version=OPSET, fallback=True)(model)
    except Exception as error:  # the converter's own types, and whatever its adapters stumble over
        reason = reason or f" ({first_line(error)})"
    if model.opset_imports.get("", 0) != OPSET:
        raise UnsupportedError(
            f"{path}: its opset {version} cannot be raised to {OPSET}{reason}; export the model "
            "again with a newer one"
        )


def _unknown_operation(model: ir.Model) -> str:
    """The first node that no converter can know, in words."""
    for node in model.graph.all_nodes():
        if node.domain in STANDARD and not onnx.defs.has(node.op_type):
            return f" (the node {node.name!r} is no ONNX operation: {node.op_type!r})"
        if node.domain not in STANDARD and node.domain not in model.opset_imports:
            return f" (the domain {node.domain!r} of the node {node.name!r} has no version)"
    return ""


def _root(error: BaseException) -> str:
    """The first line of the error that was first in a chain."""
    while behind := error.__cause__ or error.__context__:
        error = behind
    return first_line(error)
