"""Names of nodes that say which module of the model they belong to.

``model/layers/0/self_attn/q_proj/MatMul_12``: the path of the module, the operation, and a number
where the scope has several of them.
"""

import ast
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: ir.Model, layers: Collection[str]) -> None:
    """Name every node of the graph by its module, in place, and drop the metadata of the exporter.

    They are stack traces, which are most of a file and hold paths of this machine. `layers` are the
    paths of the MoE layers: what was made for one has a name that begins with it.
    """
    initializers = set(model.graph.initializers)
    named = [(node, _name(node, layers, initializers)) for node in model.graph.all_nodes()]
    counts = Counter(name for _, name in named)
    seen: Counter[str] = Counter()
    for node, name in named:
        node.name = f"{name}_{seen[name]}" if counts[name] > 1 else name
        seen[name] += 1
        node.metadata_props.clear()  # onnx_ir's pass would also clear the graph's signature
    inside = (node for function in model.functions.values() for node in function.all_nodes())
    parts: list[ir.Node | ir.Value | ir.Model] = [*inside, *model.graph.inputs, model]
    for part in parts:
        part.metadata_props.clear()


def _name(node: ir.Node, layers: Collection[str], initializers: Collection[str]) -> str:
    """The scope of `node` and its operation; a node that has no scope yet has only the latter."""
    old = str(node.name or "")
    layer = max((path for path in layers if old.startswith(f"{path}/")), key=len, default=None)
    if layer:
        return f"{layer.replace('.', '/')}/{old[len(layer) + 1 :]}"
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES) or "[]")  # the last is the operation
    scope = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
    if not scope:  # the module of the first parameter
        parameters = (str(v.name) for v in node.inputs if v is not None and v.name in initializers)
        scope = next(parameters, "").rpartition(".")[0]
    return f"{scope.replace('.', '/')}/{node.op_type}" if scope else node.op_type
