"""From opaque nodes to nodes that run: the fused kernel, or standard operations, or both of them.

Shape suffixes: T tokens, D d_model, O d_out, E experts, I expert width, G = arity * I.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from upcycle.onnx.node_names import SCOPES
from upcycle.onnx.nodes import OPSET, Nodes
from upcycle.onnx.tensors import numbers_of
from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Form, Onnx
from upcycle.targets.onnx.forms import functions as bodies
from upcycle.targets.onnx.forms.choose import CUDA_SWIGLU, Choice, choose, needs_new_cuda
from upcycle.targets.onnx.forms.fused import expansion, fused, rounded
from upcycle.targets.onnx.forms.int8 import int8, registered, round_matrices
from upcycle.targets.onnx.forms.routed import Routed
from upcycle.targets.onnx.share_weights import Store
from upcycle.targets.onnx.torch_ops.opaque import OPAQUE
from upcycle.util.installed import installed_version

log = logging.getLogger(__name__)


def lower(
    model: ir.Model,
    layers: Mapping[str, Routed],
    store: Store,
    options: Onnx,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> dict[str, Choice]:
    """Replace every opaque node of `model`, in place, and add the functions behind the new ones.

    `layers` has the layer behind each opaque node by path, and so is returned what it has become
    by `options`, see `choose`; with ``onnx.weights: int8`` other matrices are rounded, too. What
    `store` has on disk decides whether a gated layer reads one stack or two. The experts compute in
    `dtype`.
    """
    if options.weights == "int8":
        round_matrices(model, options.block, unpack=options.unpacks)
    nodes = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == OPAQUE]
    paths = [n.attributes["layer"].as_string() for n in nodes]
    chosen = {path: choose(layers[path], options) for path in dict.fromkeys(paths)}
    others = sum(options.form not in ("auto", choice.form) for choice in chosen.values())
    if others:
        log.warning(
            "%d of %d MoE layers are unrolled: ONNX Runtime has no %s node for what they compute "
            "(erf GELU: `onnx.gelu: tanh` accepts its form of it)",
            *(others, len(chosen), options.form),
        )
    wider = sum(choice.bits not in (None, options.bits) for choice in chosen.values())
    if wider:
        log.warning(
            "%d of %d MoE layers have weights of 8 bits and not of %d: only a node of ONNX Runtime "
            "reads those, and it does not compute these layers, or not in their width (erf GELU: "
            "`onnx.gelu: tanh`), or the profile is portable",
            *(wider, len(chosen), options.bits),
        )
    _check_installed([choice.pointwise for choice in chosen.values() if choice.kernel], options)
    by_kernel = {path: made.kernel for path, made in chosen.items() if "fused" in made.forms}
    used = sorted({kernel.activation for kernel in by_kernel.values() if kernel})
    biased = any(layers[path].experts.has_bias for path in by_kernel)
    made = _Made(store, options, biased)
    calls: Counter[str] = Counter()
    for node, path in zip(nodes, paths, strict=True):
        scopes = {key: value for key, value in node.metadata_props.items() if key == SCOPES}
        call = f"{calls[path]}/" if calls[path] else ""  # a layer may be applied more than once
        calls[path] += 1
        n = Nodes((f"{path}/" if path else "") + call, scopes, dtype=dtype)
        _put(node, n, _layer(n, node, layers[path], chosen[path], made))
    functions = list(made.functions.values())
    if used:
        functions.append(bodies.fused(used, bias=biased, dtype=dtype))
    if any(choice.kernel is not None for choice in chosen.values()):
        model.opset_imports[bodies.MS] = 1
    if made.functions:
        model.opset_imports[bodies.OWN] = 1
    else:
        model.opset_imports.pop(bodies.OWN, None)
    model.opset_imports[""] = max(OPSET, model.opset_imports.get("", OPSET))
    for function in functions:
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    return chosen


def _check_installed(activations: Sequence[Pointwise], options: Onnx) -> None:
    """Tell of an ONNX Runtime here that would compute another function on CUDA."""
    found = next(filter(None, map(installed_version, ("onnxruntime-gpu", "onnxruntime"))), None)
    if found is None or not any(needs_new_cuda(activation, options) for activation in activations):
        return
    if tuple(map(int, found.split(".")[:2])) < CUDA_SWIGLU:
        log.warning(
            "ONNX Runtime %s is installed, and before %d.%d its kernel for CUDA computes SwiGLU "
            "with constants of its own: update it, or write `onnx.form: unrolled`",
            *(found, *CUDA_SWIGLU),
        )


@dataclass(frozen=True)
class _Made:
    """What the layers of a file share: `functions` of standard operations are added when used."""

    store: Store
    options: Onnx
    biased: bool
    functions: dict[str, ir.Function] = field(default_factory=dict)


def _put(old: ir.Node, n: Nodes, out: ir.Value) -> None:
    (before,) = old.outputs
    graph = old.graph
    assert graph is not None
    out.shape, out.type = before.shape, before.type
    name = out.name
    ir.convenience.replace_nodes_and_values(graph, old, [old], n.nodes, [before], [out])
    out.name = name


def _layer(n: Nodes, node: ir.Node, layer: Routed, choice: Choice, made: _Made) -> ir.Value:
    """The nodes of a layer: one form, or two of which the number of tokens takes one."""
    if choice.longer is None:
        return _form(choice.form, n, node, layer, choice, made)
    branches = {}
    for branch, form in (("then_branch", choice.form), ("else_branch", choice.longer)):
        inner = n.inside(form)
        out = _form(form, inner, node, layer, choice, made)
        out.shape, out.type = node.outputs[0].shape, node.outputs[0].type
        branches[branch] = ir.Graph([], [out], nodes=inner.nodes, name=form)
    tokens = n("Squeeze", n("Shape", node.inputs[0], start=0, end=1))
    return n("If", n("Less", tokens, n.const(choice.limit)), name="by_length", **branches)


def _form(
    form: Form, n: Nodes, node: ir.Node, layer: Routed, choice: Choice, made: _Made
) -> ir.Value:
    if form == "fused" and choice.kernel is not None:
        return fused(n, node, layer, choice.kernel, made.store, biased=made.biased)
    if form == "quantised" and choice.kernel is not None:
        return rounded(n, node, layer, choice.kernel, made.options)
    x_TD, weights_TE, up, down, *bias = node.inputs
    assert down is not None
    if choice.bits:
        assert up is not None
        stacks = [int8(numbers_of(value), made.options.block) for value in (up, down)]
        ups, downs = (
            registered(node.graph, str(value.name), stack)
            for value, stack in zip((up, down), stacks, strict=True)
        )
        blocks = [stack.block for stack in stacks]
    else:
        ups, downs = [expansion(n, node, layer, made.store, interleave=False)], [down]
        blocks = []
    pointwise, count = choice.pointwise, layer.experts.num_experts
    # The same for layers that compute alike.
    key = json.dumps([form, pointwise.to_json(), count, bool(bias), *blocks])
    if key not in made.functions:
        stem = f"MoE_{'dense_' if form == 'dense' else ''}{pointwise.name}_{count}"
        taken = sum(function.name.startswith(stem) for function in made.functions.values())
        name = f"{stem}_{taken}" if taken else stem
        made.functions[key] = bodies.standard(
            form,
            name,
            pointwise,
            count,
            bias=bool(bias),
            blocks=blocks,
            unpack=made.options.unpacks,
            dtype=n.dtype,
        )
    if n.is_half:
        weights_TE = n("CastLike", weights_TE, x_TD)
    inputs = (x_TD, weights_TE, *ups, *bias, *downs)
    return n(made.functions[key].name, *inputs, domain=bodies.OWN, name="MoE")
