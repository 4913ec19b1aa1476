"""What the nodes of an ONNX graph are called, where in the model they are, what is in them."""

import ast

import onnx_ir as ir

from upcycle.onnx.node_names import SCOPES

# How the analysis calls operations that have no torch call here.
TORCH_NAMES = {
    "BatchNormalization": "batch_norm",
    "GroupNormalization": "group_norm",
    "InstanceNormalization": "instance_norm",
    "LayerNormalization": "layer_norm",
    "LogSoftmax": "log_softmax",
    "LpNormalization": "normalize",
    "MoE": "grouped_mm",
    "QMoE": "grouped_mm",
    "RMSNormalization": "rms_norm",
    "ReduceL2": "norm",
    "ReduceLogSumExp": "logsumexp",
    "ReduceMax": "amax",
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "SimplifiedLayerNormalization": "rms_norm",
}


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


def label_of(node: ir.Node) -> str:
    """A name for the node, with dots."""
    return str(node.name or node.outputs[0].name).strip("/").replace("/", ".")


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The branches of an If, the body of a Loop or Scan."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs += attribute.as_graphs()
    return graphs


def added_weights(node: ir.Node) -> list[str]:
    """Names of the constants that are added to the output of a node."""
    users = [user for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
    values = [v for user in users for v in user.inputs if v is not None]
    return [str(v.name) for v in values if ir.convenience.get_const_tensor(v) is not None]
