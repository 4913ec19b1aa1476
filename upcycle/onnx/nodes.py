"""Building ONNX nodes with names that a reader of the graph understands."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnxscript
from onnx_ir.tape import Tape

OPSET, IR_VERSION = 21, 10  # which came together; string Equal needs opset 19


class Nodes(Tape):
    """Nodes in the order of their making.

    `scope` is the prefix of every name; `dtype` that of the floats that they compute with.
    """

    def __init__(
        self,
        scope: str = "",
        metadata: dict[str, str] | None = None,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> None:
        super().__init__()
        self.scope = scope
        self.dtype = dtype
        self._metadata = metadata or {}
        self._count = 0

    def __call__(self, op_type: str, *inputs: ir.Value | None, **more: Any) -> ir.Value:
        """One node with one output; `more` is as for `many`."""
        (value,) = self.many(op_type, *inputs, outputs=1, **more)
        return value

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
        full = self.scope + (name or f"{op_type}_{self._count}")
        self._count += 1
        names = [full] if outputs == 1 else [f"{full}.{i}" for i in range(outputs)]
        version = OPSET if domain == "" else 1
        values = [ir.Value(name=value) for value in names]
        self.op_multi_out(
            op_type,
            inputs,
            attrs,
            outputs=values,
            domain=domain,
            version=version,
            name=full,
            metadata_props=dict(self._metadata),
        )
        return values

    def inside(self, branch: str) -> "Nodes":
        """Nodes for a subgraph, with names of their own."""
        return Nodes(f"{self.scope}{branch}/", self._metadata, dtype=self.dtype)

    @property
    def is_half(self) -> bool:
        """Whether the floats are narrower than float32."""
        return self.dtype != ir.DataType.FLOAT

    def const(self, value: float | int | list[int]) -> ir.Value:
        """A scalar of `dtype` for a float; int64 for an int or a list of ints."""
        dtype = self.dtype if isinstance(value, float) else ir.DataType.INT64
        return self("Constant", value=ir.tensor(value, dtype=dtype))

    def zeros(self, shape: ir.Value) -> ir.Value:
        """Zeros of `dtype`."""
        return self("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=self.dtype))


class Traced(Nodes):
    """Nodes inside a translation of torch's own exporter, under names that it chooses."""

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
