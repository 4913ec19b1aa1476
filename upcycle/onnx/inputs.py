"""Inputs for a graph without a description: token ids, masks, images, by what the graph does."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from upcycle.onnx.shapes import axis_sizes

Array = npt.NDArray[np.generic]
_PASSES = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def draw_inputs(model: ir.Model, *, seed: int = 0) -> dict[str, Array]:
    """Random inputs of `model`: floats are normal, masks all ones, ids within their embedding."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value, (name, shape) in zip(model.graph.inputs, axis_sizes(model).items(), strict=True):
        dtype = value.dtype or ir.DataType.FLOAT
        array: Array
        if "mask" in name.lower() or dtype == ir.DataType.BOOL:
            array = np.ones(shape)
        elif dtype.is_floating_point():
            array = generator.standard_normal(shape)
        elif "position" in name.lower():
            array = np.broadcast_to(np.arange(shape[-1] if shape else 1), shape)
        else:
            rows = min(_embeddings(value), default=2)
            array = np.asarray(generator.integers(0, rows, shape))
        feeds[name] = np.array(array, dtype.numpy())
    return feeds


def given_inputs(model: ir.Model, example: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs that the user gave, by the names and in the types of the graph.

    Raises:
        KeyError: one is missing.
    """
    return {
        str(value.name): example[str(value.name)].astype((value.dtype or ir.DataType.FLOAT).numpy())
        for value in model.graph.inputs
    }


def _embeddings(value: ir.Value) -> Iterator[int]:
    """The rows of the embeddings that `value` chooses from."""
    uses = list(value.uses())
    for node, index in uses:  # grows
        if node.op_type in _PASSES and index == 0 and node.outputs:
            uses += node.outputs[0].uses()
        elif node.op_type == "Gather" and index == 1 and len(_shape(node.inputs[0])) == 2:
            yield _rows(node.inputs[0])
        elif node.op_type == "EmbedLayerNormalization" and index < 2:
            yield _rows(node.inputs[(2, 4)[index]])


def _shape(value: ir.Value | None) -> tuple[object, ...]:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    shape = getattr(value, "shape", None) if tensor is None else tensor.shape
    return tuple(shape or ())


def _rows(value: ir.Value | None) -> int:
    first = next(iter(_shape(value)), None)
    return first if isinstance(first, int) else 2


def describe(feeds: Mapping[str, Array]) -> str:
    """The inputs in a few words, for reports."""
    parts = [f"{name} {list(array.shape)}" for name, array in feeds.items()]
    count = sum(math.prod(array.shape) for array in feeds.values())
    return f"random inputs: {', '.join(parts)} ({count} numbers)"
