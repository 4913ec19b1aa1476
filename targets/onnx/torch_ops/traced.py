"""Nodes inside a translation of torch's own ONNX exporter."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnxscript

from upcycle.onnx.nodes import OPSET, Nodes


class Traced(Nodes):
    """Nodes that the exporter writes down, under names of its own."""

    def many(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        name: str = "",
        **attrs: Any,
    ) -> list[ir.Value]:
        """One node with any number of outputs."""
        has_sizes = op_type == "Split" and len(inputs) == 2
        if has_sizes:  # the exporter wants their number, which ONNX does not want beside them
            attrs["num_outputs"] = outputs
        made = getattr(getattr(onnxscript, f"opset{OPSET}"), op_type)(*inputs, **attrs)
        values = list(made) if isinstance(made, Sequence) else [made]
        if has_sizes:
            del values[0].producer().attributes["num_outputs"]
        return values
