"""The axes of a graph that may vary, and their names."""

import logging
import re
from collections.abc import Mapping

import onnx_ir as ir
import torch

from upcycle.errors import UnsupportedError
from upcycle.targets.traced.axes import Axes

log = logging.getLogger(__name__)


def fixed_sizes(program: torch.onnx.ONNXProgram) -> dict[str, int]:
    """The symbols that have one value only: the graph shows them as if they could vary."""
    assert program.exported_program is not None
    ranges = program.exported_program.range_constraints
    return {str(s): int(r.lower) for s, r in ranges.items() if r.lower == r.upper}


def name_axes(model: ir.Model, axes: Axes, fixed: Mapping[str, int], *, required: bool) -> None:
    """Name the dynamic axes of the inputs, and what follows from them inside, in place.

    `fixed` is what `fixed_sizes` returns. An axis that can only have one size is refused if
    `required`; else the log says so.

    Raises:
        UnsupportedError: an axis is required and has one size only.
    """
    renamed: dict[str, str | int] = dict(fixed)
    for value in model.graph.inputs:
        for axis, label in axes.get(str(value.name), {}).items():
            assert value.shape is not None
            size = value.shape[axis]
            only = size if isinstance(size, int) else fixed.get(str(size.value))
            if only is None and not isinstance(size, int):
                renamed.setdefault(str(size.value), label)
                continue
            problem = f"axis {axis} ({label}) of input {value.name} can only be {only}"
            if required:
                raise UnsupportedError(f"{problem}: the model's code depends on it")
            log.warning("%s", problem)
    for value in (*model.graph.inputs, *(o for node in model.graph for o in node.outputs)):
        if value.shape is None or value.shape.frozen:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is not None:  # else the size is not known
                # Symbols also stand in products, such as ``s31*s81``.
                label = re.sub(r"\w+", lambda m: str(renamed.get(m[0], m[0])), str(size.value))
                value.shape[axis] = int(label) if label.isdigit() else label
