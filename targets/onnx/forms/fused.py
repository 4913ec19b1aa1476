"""Layers as one node of ONNX Runtime: ``com.microsoft::MoE``, or ``QMoE`` with rounded weights.

Shape suffixes: T tokens, D d_model, E experts, I expert width, G = arity * I.
"""

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch

from upcycle.ir.quantise import quantise
from upcycle.onnx.nodes import Nodes
from upcycle.onnx.tensors import numbers_of, tensor_of
from upcycle.recipe.onnx import Onnx
from upcycle.targets.native.fold_layer import interleaved
from upcycle.targets.onnx.forms import functions as bodies
from upcycle.targets.onnx.forms.choose import Kernel
from upcycle.targets.onnx.forms.routed import Routed
from upcycle.targets.onnx.share_weights import Store

_FLOOR = 1e-30  # for Log: a weight of zero becomes a score that no choice prefers


def fused(
    n: Nodes, node: ir.Node, layer: Routed, kernel: Kernel, store: Store, *, biased: bool
) -> ir.Value:
    """``MoE(x, Log(weights)) * sum of weights``, which is exact for any weights >= 0."""
    x_TD, weights_TE, _, down_EDI, *bias = node.inputs
    assert weights_TE is not None
    experts = layer.experts
    up_EGD = expansion(n, node, layer, store, interleave=kernel.gated)
    bias_EG = _alternating(n, bias[0], layer, kernel) if bias else None
    if bias_EG is None and biased:  # the function behind all these nodes reads one
        bias_EG = n.zeros(n.const(list(experts.up_EGD.shape[:2])))
    # In float32 whatever the graph is: a narrow type has no 1e-30.
    floor = n("Constant", value=ir.tensor(_FLOOR, dtype=ir.DataType.FLOAT))
    scores_TE = n("Log", n("Max", weights_TE, floor), name="scores")
    if n.is_half:
        scores_TE = n("CastLike", scores_TE, x_TD)
    y_TD = n(
        "MoE",
        *(x_TD, scores_TE, up_EGD, bias_EG, down_EDI),
        domain=bodies.MS,
        name="MoE",
        normalize_routing_weights=1,
        **_attributes(layer, kernel),
    )
    total = layer.total
    if total == 1.0:
        return y_TD
    if total is not None:
        return n("Mul", y_TD, n.const(total), name="scale")
    sum_T1 = n("ReduceSum", weights_TE, n.const([1]), keepdims=1)
    if n.is_half:
        sum_T1 = n("CastLike", sum_T1, x_TD)
    return n("Mul", y_TD, sum_T1, name="scale")


def rounded(n: Nodes, node: ir.Node, layer: Routed, kernel: Kernel, options: Onnx) -> ir.Value:
    """``QMoE``: the weights of the router choose the experts, and are used as they are.

    The rounded matrices and their scales become initializers, named after their originals.
    """
    x_TD, weights_TE, up_EGD, down_EDI, *bias = node.inputs
    up, down = numbers_of(up_EGD), numbers_of(down_EDI)
    if kernel.gated:
        up = interleaved(up, 2)
    stacks = quantise([up, down], options.bits, options.block)
    values: list[ir.Value] = []
    for value, stack in zip((up_EGD, down_EDI), stacks, strict=True):
        assert value is not None
        stem = f"{value.name}.int{options.bits}"
        values.append(initializer(node.graph, stem, stack.packed))
        values.append(initializer(node.graph, f"{stem}.scale", stack.scale))
    packed_up, scale_up, packed_down, scale_down = values
    bias_EG = _alternating(n, bias[0], layer, kernel) if bias else None
    weights_TE = n("CastLike", weights_TE, x_TD) if n.is_half else weights_TE
    block = stacks[0].block
    return n(
        "QMoE",
        *(x_TD, weights_TE, packed_up, scale_up, bias_EG, packed_down, scale_down),
        *[None] * 7,  # no bias of the output, no third matrix, no zero points
        weights_TE,
        domain=bodies.MS,
        name="MoE",
        normalize_routing_weights=0,
        expert_weight_bits=options.bits,
        weights_prepacked=0,
        **({} if block is None else {"block_size": block}),
        **_attributes(layer, kernel),
    )


def _attributes(layer: Routed, kernel: Kernel) -> dict[str, int | float | str]:
    """All attributes of the function, also those with their defaults: evaluators want them."""
    return {
        "k": layer.top_k,
        "activation_type": kernel.activation,
        "swiglu_fusion": int(kernel.gated),
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }


def _alternating(
    n: Nodes, bias_EG: ir.Value | None, layer: Routed, kernel: Kernel
) -> ir.Value | None:
    """The bias of the expansion in the order of its rows: gate 0, up 0, gate 1, up 1, ..."""
    if bias_EG is None or not kernel.gated:
        return bias_EG
    count = layer.experts.num_experts
    pairs = n("Reshape", bias_EG, n.const([count, 2, -1]))
    return n("Reshape", n("Transpose", pairs, perm=[0, 2, 1]), n.const([count, -1]))


def expansion(
    n: Nodes, node: ir.Node, layer: Routed, store: Store, *, interleave: bool
) -> ir.Value:
    """The fused expansion [E, G, D], made from what is on disk; ONNX Runtime folds it at load."""
    up_EGD, graph = node.inputs[2], node.graph
    assert up_EGD is not None
    tensor = tensor_of(up_EGD)
    arity = layer.experts.act_fn.pointwise.arity
    if arity == 1 or tensor is None:
        return up_EGD
    num_experts, rows, d_model = tensor.shape
    shape = n.const([num_experts, rows, d_model])
    parts: list[torch.Tensor] = list(tensor.chunk(arity, dim=1))
    if store.find(tensor) is None and all(store.find(part) is not None for part in parts):
        values = [initializer(graph, f"{up_EGD.name}.{i}", part) for i, part in enumerate(parts)]
        if not interleave:
            return n("Concat", *values, axis=1, name="gate_up")
        pairs = n("Concat", *(n("Unsqueeze", v, n.const([2])) for v in values), axis=2)
        return n("Reshape", pairs, shape, name="gate_up")
    alternating = interleaved(tensor, arity)
    is_alternating = store.find(tensor) is None and store.find(alternating) is not None
    if is_alternating:
        up_EGD = initializer(graph, f"{up_EGD.name}.alternating", alternating)
    if interleave == is_alternating:
        return up_EGD
    axes = (rows // arity, arity) if is_alternating else (arity, rows // arity)
    split = n("Reshape", up_EGD, n.const([num_experts, *axes, d_model]))
    return n("Reshape", n("Transpose", split, perm=[0, 2, 1, 3]), shape, name="gate_up")


def initializer(graph: ir.Graph | ir.Function | None, name: str, tensor: torch.Tensor) -> ir.Value:
    """An initializer of this name, made if there is none yet."""
    assert isinstance(graph, ir.Graph)
    if name not in graph.initializers:
        const = onnx_ir.tensor_adapters.TorchTensor(tensor, name=name)
        value = ir.Value(name=name, const_value=const, shape=ir.Shape(tensor.shape))
        value.type = ir.TensorType(const.dtype)
        graph.register_initializer(value)
    return graph.initializers[name]
