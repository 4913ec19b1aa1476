"""From opaque nodes to nodes that run: the fused kernel, or standard operations.

Shape suffixes: T tokens, D d_model, O d_out, E experts, I expert width, G = arity * I.
"""

import json
import logging
from collections.abc import Mapping

import onnx_ir as ir

from upcycle.moe import MoE
from upcycle.onnx_options import Onnx
from upcycle.targets.onnx import bodies
from upcycle.targets.onnx.external import Store
from upcycle.targets.onnx.forms import Form, choose
from upcycle.targets.onnx.fused import expansion, fused, rounded
from upcycle.targets.onnx.nodes import OPSET, Nodes
from upcycle.targets.onnx.scopes import SCOPES
from upcycle.targets.onnx.symbolic import OPAQUE

log = logging.getLogger(__name__)


def lower(
    model: ir.Model,
    layers: Mapping[str, MoE],
    store: Store,
    options: Onnx,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> dict[str, Form]:
    """Replace every opaque node of `model`, in place, and add the functions behind the new ones.

    Args:
        model: the exported graph.
        layers: the layer behind each opaque node, by path.
        store: what is on disk: decides whether a gated layer reads one stack or two.
        options: which form each layer gets, see `choose`.
        dtype: in which the experts compute.

    Returns:
        The form of each layer.
    """
    nodes = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == OPAQUE]
    paths = [n.attributes["layer"].as_string() for n in nodes]
    chosen = {path: choose(layers[path], options) for path in dict.fromkeys(paths)}
    others = sum(options.form not in ("auto", form) for form, _ in chosen.values())
    if others:
        log.warning(
            "%d of %d MoE layers are unrolled: ONNX Runtime has no %s node for what they compute "
            "(erf GELU: `onnx.gelu: tanh` accepts its form of it)",
            *(others, len(chosen), options.form),
        )
    used = {kernel.activation for form, kernel in chosen.values() if form == "fused" and kernel}
    biased = any(layers[p].experts.has_bias for p, (form, _) in chosen.items() if form == "fused")
    unrolled: dict[str, ir.Function] = {}
    for node, path in zip(nodes, paths, strict=True):
        n = Nodes(f"{path}/" if path else "", _scopes(node), dtype=dtype)
        layer, (form, kernel) = layers[path], chosen[path]
        if kernel is None:
            out = _unrolled(n, node, layer, store, unrolled)
        elif form == "quantised":
            out = rounded(n, node, layer, kernel, options)
        else:
            out = fused(n, node, layer, kernel, store, biased=biased)
        _put(node, n, out)
    functions = list(unrolled.values())
    if used:
        functions.append(bodies.fused(sorted(used), bias=biased, dtype=dtype))
    if any(kernel is not None for _, kernel in chosen.values()):
        model.opset_imports[bodies.MS] = 1
    if unrolled:
        model.opset_imports[bodies.OWN] = 1
    else:
        model.opset_imports.pop(bodies.OWN, None)
    model.opset_imports[""] = max(OPSET, model.opset_imports.get("", OPSET))
    for function in functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    return {path: form for path, (form, _) in chosen.items()}


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


def _unrolled(
    n: Nodes, node: ir.Node, layer: MoE, store: Store, functions: dict[str, ir.Function]
) -> ir.Value:
    """A node ``upcycle::MoE_...``; layers that compute the same share one function."""
    x_TD, weights_TE, _, down_EOI, *bias = node.inputs
    up_EGD = expansion(n, node, layer, store, interleave=False)
    pointwise, experts = layer.experts.act_fn.pointwise, layer.experts
    key = json.dumps([pointwise.to_json(), experts.num_experts, bool(bias)])
    if key not in functions:
        stem = f"MoE_{pointwise.name}_{experts.num_experts}"
        taken = sum(function.name.startswith(stem) for function in functions.values())
        name = f"{stem}_{taken}" if taken else stem
        functions[key] = bodies.unrolled(
            name, pointwise, experts.num_experts, bias=bool(bias), dtype=n.dtype
        )
    if n.is_half:
        weights_TE = n("CastLike", weights_TE, x_TD)
    return n(
        functions[key].name,
        *(x_TD, weights_TE, up_EGD, *bias, down_EOI),
        domain=bodies.OWN,
        name="MoE",
    )
