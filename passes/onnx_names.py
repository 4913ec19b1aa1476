"""Where in the exported model a node of an ONNX graph comes from, by what exporters write into it."""

import ast

import onnx_ir as ir

from upcycle.targets.onnx.lower import SCOPES


def path_of(node: ir.Node) -> str:
    """The module that the exporter made the node from: of its scopes, or of its name."""
    if scopes := node.metadata_props.get(SCOPES):
        try:
            names = [name for name in ast.literal_eval(scopes) if name]
        except (SyntaxError, ValueError):
            names = []
        if len(names) > 1:
            return str(names[-2])
    name = node.name or ""
    return name.strip("/").rpartition("/")[0].replace("/", ".") if "/" in name else ""


def added_weights(node: ir.Node) -> list[str]:
    """Names of the constants that are added to the output of a node."""
    users = [user for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
    values = [v for user in users for v in user.inputs if v is not None]
    return [str(v.name) for v in values if ir.convenience.get_const_tensor(v) is not None]
