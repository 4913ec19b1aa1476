"""Reading an ONNX file of any origin, and bringing it to the opset of our nodes.

Weights in external files are not read: onnx_ir maps them when they are asked for.
"""

import logging
from collections import Counter
from collections.abc import Set
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.version_converter import ConvertVersionPass

from upcycle.errors import UnsupportedError, UsageError, first_line, reason_of
from upcycle.onnx.external_data import external_files
from upcycle.onnx.nodes import IR_VERSION, OPSET
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
    _check_kinds(path, proto.graph)
    for entry, file in external_files(path, proto):  # of the graph in memory only
        entry.value = str(file)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises types of its own, and KeyErrors, for broken graphs
        raise UsageError(f"{path}: the graph is not valid: {reason_of(error)}") from error
    _check_external(path, model)
    del proto
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    with quiet_logs("onnxscript", "onnx_ir", level=logging.CRITICAL):  # advice to its own callers
        common.RemoveInitializersFromInputsPass()(model)
        if model.functions:
            try:
                common.InlinePass()(model)
            except Exception as error:  # onnx_ir's own types: a function that calls itself
                raise UsageError(
                    f"{path}: its functions are not valid: {reason_of(error)}"
                ) from error
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
        for word in (node.op_type, node.domain, node.name):
            if not isinstance(word, str):  # as protobuf gives what is no UTF-8
                raise UsageError(f"{broken} a node has the name {word!r}, which is no text")
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
    counts: Counter[str] = Counter()
    for graph in (model.graph, *model.graph.subgraphs()):
        made = [*graph.inputs, *graph.initializers.values()]
        made += [value for node in graph for value in node.outputs]
        for value in (value for value in made if value.name):
            name = str(value.name)
            while value.name in taken:
                counts[name] += 1
                value.name = f"{name}/{counts[name]}"
            taken.add(str(value.name))


def _check_external(path: Path, model: ir.Model) -> None:
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    for tensor in (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)):
        size = Path(tensor.location).stat().st_size
        if size < (tensor.offset or 0) + (tensor.length or tensor.nbytes):
            raise UsageError(
                f"{path}: its external data {Path(tensor.location).name} is too short for "
                f"{tensor.name}; it is truncated, or of another model"
            )


def _check_kinds(path: Path, graph: onnx.GraphProto) -> None:
    """Refuse what onnx_ir has no form for: maps, and tensors that are stored sparse."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if _has_map(value.type):
            raise UnsupportedError(
                f"{path}: {value.name} is a map, or a sequence of maps, and only tensors can be "
                "converted; export the model again without it (skl2onnx: zipmap=False)"
            )
    sparse = [tensor.values.name or tensor.indices.name for tensor in graph.sparse_initializer]
    for node in graph.node:
        kinds = {attribute.type for attribute in node.attribute}
        if kinds & {onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS}:
            sparse.append(node.output[0] if node.output else node.name)
        for inner in subgraphs(node):
            _check_kinds(path, inner)
    if sparse:
        raise UnsupportedError(
            f"{path}: its tensor {sparse[0]!r} is stored sparse, which cannot be read; export the "
            "model again with dense weights"
        )


def _has_map(kind: onnx.TypeProto) -> bool:
    which = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        return _has_map(getattr(kind, which).elem_type)
    return bool(which == "map_type")


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
