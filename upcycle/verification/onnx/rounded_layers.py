"""The layers with rounded experts in an ONNX file, decoded.

Shape suffixes: E experts, D d_model, I expert width, G = arity * I.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from upcycle.ir.quantise import Quantised, dequantise, steps_of
from upcycle.onnx.tensors import numbers_of
from upcycle.pointwise import Pointwise
from upcycle.targets.native.fold_layer import interleaved
from upcycle.targets.onnx.forms.choose import kernel_named
from upcycle.targets.onnx.forms.functions import MS, OWN
from upcycle.targets.onnx.forms.int8 import Int8


@dataclass(frozen=True)
class RoundedLayer:
    """A node of a file with rounded experts: ``QMoE``, or a function of standard operations.

    Attributes:
        layer: path of its layer.
        x, weights, y: names of its tensors: tokens, the weight of each expert, and the output.
        pointwise: what ``QMoE`` computes; None for a function, which computes what the layer does.
        up_EGD, down_EDI: the decoded matrices; gate rows first.
        step: the quantisation steps of the two, see `steps_of`.
        bits, block: bits of a weight, and the number of inputs that share a scale, or ``row``.
        rounds_tokens: group size in which the kernel rounds its input to 8 bits; 0 if it does not.
        dtype: of everything that the kernel does not round.
    """

    layer: str
    x: str
    weights: str
    y: str
    pointwise: Pointwise | None
    up_EGD: torch.Tensor
    down_EDI: torch.Tensor
    step: tuple[torch.Tensor, torch.Tensor]
    bits: int
    block: int | str
    rounds_tokens: int
    dtype: torch.dtype


def rounded_layers(path: Path) -> Iterator[RoundedLayer]:
    """The rounded layers of a file, one after the other."""
    for node in _rounded_nodes(path):
        if node.domain == OWN:
            yield _of_function(node)
            continue
        bits = node.attributes["expert_weight_bits"].as_int()
        block = node.attributes.get_int("block_size", 0)
        kernel, pointwise = kernel_named(node.attributes["activation_type"].as_string())
        (up, up_step), (down, down_step) = (_decoded(node, i, bits, block) for i in (2, 5))
        x, weights = (str(value.name) for value in (node.inputs[0], node.inputs[14]) if value)
        if kernel.gated:  # the rows of gate and up alternate in the file
            up, up_step = (interleaved(t, t.shape[1] // 2) for t in (up, up_step))
        yield RoundedLayer(
            layer=_layer_of(node),
            x=x,
            weights=weights,
            y=str(node.outputs[0].name),
            pointwise=pointwise,
            up_EGD=up,
            down_EDI=down,
            step=(up_step, down_step),
            bits=bits,
            block=block or "row",
            rounds_tokens=block if bits == 8 else 0,
            dtype=numbers_of(node.inputs[3]).dtype,
        )


def rounds_tokens(path: Path) -> bool:
    """Whether a node of a file rounds its tokens to 8 bits, too, in every session."""
    quantised = (node.attributes for node in _rounded_nodes(path) if node.domain == MS)
    return any(
        found["expert_weight_bits"].as_int() == 8 and found.get_int("block_size", 0)
        for found in quantised
    )


def rounded_paths(path: Path) -> set[str]:
    """The paths of the rounded layers of a file; no weight is read."""
    return set(map(_layer_of, _rounded_nodes(path)))


def _of_function(node: ir.Node) -> RoundedLayer:
    x, weights, up, up_scale, *_, down, down_scale = node.inputs
    assert x is not None
    assert weights is not None
    scales = numbers_of(up_scale), numbers_of(down_scale)
    ups, downs = (
        Int8(numbers_of(value), scale) for value, scale in zip((up, down), scales, strict=True)
    )
    return RoundedLayer(
        layer=_layer_of(node),
        x=str(x.name),
        weights=str(weights.name),
        y=str(node.outputs[0].name),
        pointwise=None,
        up_EGD=ups.floats(),
        down_EDI=downs.floats(),
        step=(ups.steps(), downs.steps()),
        bits=8,
        block=ups.block,
        rounds_tokens=0,
        dtype=scales[0].dtype,
    )


def _rounded_nodes(path: Path) -> list[ir.Node]:
    return [node for node in ir.load(path).graph.all_nodes() if _is_rounded(node)]


def _is_rounded(node: ir.Node) -> bool:
    if node.domain == OWN:
        return any(v is not None and v.dtype == ir.DataType.INT8 for v in node.inputs)
    return (node.domain, node.op_type) == (MS, "QMoE")


def _layer_of(node: ir.Node) -> str:
    """`lower` names what it makes after the layer, and after the number of a further call."""
    return re.sub(r"/\d+$", "", str(node.outputs[0].name).rpartition("/")[0])


def _decoded(node: ir.Node, place: int, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of matrices, and its quantisation steps."""
    packed, scale = (numbers_of(value) for value in node.inputs[place : place + 2])
    columns = packed.shape[2] * 8 // bits
    found = Quantised(packed, scale.float(), bits, block or None)
    return dequantise(found, columns), steps_of(found, columns)
