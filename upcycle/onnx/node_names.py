"""Names of nodes that say which module of the model they belong to, for those who look at a graph.

``model/layers/0/self_attn/q_proj/MatMul_12``: the path of the module, the operation, and a number
where the scope has several of them.
"""

import ast
from collections import Counter
from collections.abc import Collection
from typing import Any

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: ir.Model, layers: Collection[str]) -> None:
    """Name every node of the graph by its module, and drop what the exporter noted about it.

    Its notes are stack traces, which are most of a file and hold paths of this machine.

    Args:
        model: the graph; changed in place.
        layers: paths of the MoE layers. What was made for one has a name that begins with it.
    """
    initializers = set(model.graph.initializers)
    counts: Counter[str] = Counter()
    named: list[tuple[ir.Node, str]] = []
    for node in model.graph.all_nodes():
        name = _name(node, layers, initializers)
        named.append((node, name))
        counts[name] += 1
    seen: Counter[str] = Counter()
    for node, name in named:
        node.name = f"{name}_{seen[name]}" if counts[name] > 1 else name
        seen[name] += 1
        node.metadata_props.clear()  # onnx_ir's pass would also clear the graph's signature
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props.clear()
    for value in model.graph.inputs:
        value.metadata_props.clear()
    model.metadata_props.clear()


def _name(node: ir.Node, layers: Collection[str], initializers: Collection[str]) -> str:
    """The scope of `node` and its operation; a node that has no scope yet has only the latter."""
    old = str(node.name or "")
    layer = max((path for path in layers if old.startswith(f"{path}/")), key=len, default=None)
    if layer:
        return f"{layer.replace('.', '/')}/{old[len(layer) + 1 :]}"
    scope = _scope(node.metadata_props.get(SCOPES)) or next(
        (
            _owner(value)
            for value in node.inputs
            if value is not None and value.name in initializers
        ),
        "",
    )
    return f"{scope.replace('.', '/')}/{node.op_type}" if scope else node.op_type


def _owner(value: ir.Value) -> str:
    """The module of a parameter."""
    return str(value.name).rpartition(".")[0]


def _scope(noted: Any) -> str:
    """The module's path in the exporter's list of scopes, whose last entry is the operation."""
    scopes = ast.literal_eval(noted) if noted else []
    return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
