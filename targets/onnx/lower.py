"""From opaque nodes to nodes that run: the fused kernel, or standard operations.

Shape suffixes: T tokens, D d_model, O d_out, E experts, I expert width, G = arity * I.
"""

import json
from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch

from upcycle.moe import MoE
from upcycle.targets.onnx import bodies
from upcycle.targets.onnx.external import Store, tensor_of
from upcycle.targets.onnx.forms import Form, Fused, Gelu, fused_form, most_visited, total_weight
from upcycle.targets.onnx.nodes import OPSET, Nodes
from upcycle.targets.onnx.symbolic import OPAQUE

SCOPES = "pkg.torch.onnx.name_scopes"
_FLOOR = 1e-30  # for Log: a weight of zero becomes a score that no choice prefers


def lower(
    model: ir.Model, layers: Mapping[str, MoE], store: Store, *, form: Form, gelu: Gelu
) -> None:
    """Replace every opaque node of `model`, in place, and add the functions behind the new ones.

    Args:
        model: the exported graph.
        layers: the layer behind each opaque node, by path.
        store: what is on disk: decides whether a gated layer reads one stack or two.
        form: ``unrolled`` uses standard operations also where the fused kernel could serve.
        gelu: see `fused_form`.
    """
    nodes = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == OPAQUE]
    paths = [n.attributes["layer"].as_string() for n in nodes]
    forms = {
        path: fused_form(layer, gelu=gelu) if form == "fused" else None
        for path, layer in layers.items()
    }
    used = [f for f in (forms[path] for path in paths) if f is not None]
    biased = any(layers[p].experts.has_bias for p in paths if forms[p] is not None)
    unrolled: dict[str, ir.Function] = {}
    for node, path in zip(nodes, paths, strict=True):
        n = Nodes(f"{path}/" if path else "", _scopes(node))
        fused = forms[path]
        if fused is not None:
            out = _fused(n, node, layers[path], fused, store, biased=biased)
        else:
            out = _unrolled(n, node, layers[path], store, unrolled)
        _put(node, n, out)
    functions = list(unrolled.values())
    if used:
        model.opset_imports[bodies.MS] = 1
        functions.append(bodies.fused(sorted({f.activation for f in used}), bias=biased))
    if unrolled:
        model.opset_imports[bodies.OWN] = 1
    else:
        model.opset_imports.pop(bodies.OWN, None)
    model.opset_imports[""] = max(OPSET, model.opset_imports.get("", OPSET))
    for function in functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function


def _scopes(node: ir.Node) -> dict[str, str]:
    return {key: value for key, value in node.metadata_props.items() if key == SCOPES}


def _put(old: ir.Node, n: Nodes, out: ir.Value) -> None:
    (before,) = old.outputs
    graph = old.graph
    assert graph is not None
    out.shape, out.type = before.shape, before.type
    name = out.name
    ir.convenience.replace_nodes_and_values(graph, old, [old], n.nodes, [before], [out])
    out.name = name


def _fused(
    n: Nodes, node: ir.Node, layer: MoE, fused: Fused, store: Store, *, biased: bool
) -> ir.Value:
    """``MoE(x, Log(weights)) * sum of weights``, which is exact for any weights >= 0."""
    x_TD, weights_TE, _, down_EOI, *bias = node.inputs
    assert weights_TE is not None
    experts = layer.experts
    up_EGD = _up(n, node, layer, store, interleave=fused.gated)
    bias_EG = bias[0] if bias else None
    if bias_EG is not None and fused.gated:
        pairs = n("Reshape", bias_EG, n.const([experts.num_experts, 2, -1]))
        pairs = n("Transpose", pairs, perm=[0, 2, 1])
        bias_EG = n("Reshape", pairs, n.const([experts.num_experts, -1]))
    elif bias_EG is None and biased:  # the function behind all these nodes reads one
        bias_EG = n("ConstantOfShape", n.const(list(experts.up_EGD.shape[:2])))
    scores_TE = n("Log", n("Max", weights_TE, n.const(_FLOOR)), name="scores")
    attributes = {
        "k": most_visited(layer),
        "activation_type": fused.activation,
        "normalize_routing_weights": 1,
        "swiglu_fusion": int(fused.gated),  # all attributes of the function: evaluators want them
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    y_TD = n(
        "MoE",
        x_TD,
        scores_TE,
        up_EGD,
        bias_EG,
        down_EOI,
        domain=bodies.MS,
        name="MoE",
        **attributes,
    )
    total = total_weight(layer)
    if total == 1.0:
        return y_TD
    if total is not None:
        return n("Mul", y_TD, n.const(total), name="scale")
    sum_T1 = n("ReduceSum", weights_TE, n.const([1]), keepdims=1)
    return n("Mul", y_TD, sum_T1, name="scale")


def _unrolled(
    n: Nodes, node: ir.Node, layer: MoE, store: Store, functions: dict[str, ir.Function]
) -> ir.Value:
    """A node ``upcycle::MoE_...``; layers that compute the same share one function."""
    x_TD, weights_TE, _, down_EOI, *bias = node.inputs
    up_EGD = _up(n, node, layer, store, interleave=False)
    pointwise, experts = layer.experts.act_fn.pointwise, layer.experts
    key = json.dumps([pointwise.to_json(), experts.num_experts, bool(bias)])
    if key not in functions:
        stem = f"MoE_{pointwise.name}_{experts.num_experts}"
        taken = sum(function.name.startswith(stem) for function in functions.values())
        name = f"{stem}_{taken}" if taken else stem
        functions[key] = bodies.unrolled(name, pointwise, experts.num_experts, bias=bool(bias))
    return n(
        functions[key].name,
        *(x_TD, weights_TE, up_EGD, *bias, down_EOI),
        domain=bodies.OWN,
        name="MoE",
    )


def _up(n: Nodes, node: ir.Node, layer: MoE, store: Store, *, interleave: bool) -> ir.Value:
    """The fused expansion [E, G, D], made from what is on disk; ONNX Runtime folds it at load."""
    up_EGD, graph = node.inputs[2], node.graph
    assert up_EGD is not None
    assert isinstance(graph, ir.Graph)
    tensor = tensor_of(up_EGD)
    arity = layer.experts.act_fn.pointwise.arity
    if arity == 1 or tensor is None:
        return up_EGD
    num_experts, rows, d_model = tensor.shape
    shape = n.const([num_experts, rows, d_model])
    parts: list[torch.Tensor] = list(tensor.chunk(arity, dim=1))
    if store.find(tensor) is None and all(store.find(part) is not None for part in parts):
        values = [_initializer(graph, f"{up_EGD.name}.{i}", part) for i, part in enumerate(parts)]
        if not interleave:
            return n("Concat", *values, axis=1, name="gate_up")
        pairs = n("Concat", *(n("Unsqueeze", v, n.const([2])) for v in values), axis=2)
        return n("Reshape", pairs, shape, name="gate_up")
    if not interleave:
        return up_EGD
    split = n("Reshape", up_EGD, n.const([num_experts, arity, rows // arity, d_model]))
    return n("Reshape", n("Transpose", split, perm=[0, 2, 1, 3]), shape, name="gate_up")


def _initializer(graph: ir.Graph, name: str, tensor: torch.Tensor) -> ir.Value:
    if name not in graph.initializers:
        const = onnx_ir.tensor_adapters.TorchTensor(tensor, name=name)
        value = ir.Value(name=name, const_value=const, shape=ir.Shape(tensor.shape))
        value.type = ir.TensorType(const.dtype)
        graph.register_initializer(value)
    return graph.initializers[name]
