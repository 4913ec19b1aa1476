"""A dense model that is an ONNX file: no torch module, no weights in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from upcycle.errors import UnsupportedError, UsageError, reason_of
from upcycle.ir.spec import Plan
from upcycle.onnx.open_file import open_graph
from upcycle.onnx.tensors import TORCH_TYPES
from upcycle.passes.locate_onnx.locate import OnnxLocated, locate_in_onnx
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.schema import Recipe


@dataclass
class OnnxSource:
    """An ONNX file, and inputs by name that the user gave, or None to draw them."""

    path: Path
    example: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """How reports and cards name it."""
        return self.path.name

    @property
    def directory(self) -> Path:
        """The folder that the file, and its external data, lie in."""
        return self.path.parent

    @property
    def paths(self) -> list[Path]:
        """What must not be written over."""
        return [self.directory]

    @cached_property
    def model(self) -> ir.Model:
        """The graph, at a recent opset; changed in place by a conversion."""
        return open_graph(self.path)

    @cached_property
    def found(self) -> OnnxLocated:
        """The FFNs of the graph and their weights."""
        try:
            return locate_in_onnx(self.model)
        except ir.serde.SerdeError as error:  # of types and names that no file can have
            raise UsageError(f"{self.path}: the graph is not valid: {reason_of(error)}") from error

    def plan(self, recipe: Recipe, recipe_name: str) -> Plan:
        """What the recipe does to the file.

        Raises:
            UnsupportedError: there is no FFN to convert, or its weights are no single numbers.
            PlanError: the recipe does not fit.
        """
        plan = make_plan(self.found.located, recipe, recipe_name=recipe_name)
        for spec in plan.specs:
            types = {self.found.parameters[name].dtype for name in spec.ffn.parameters}
            types -= {ir.DataType.FLOAT, ir.DataType.FLOAT16}
            if types:
                names = ", ".join(sorted(t.name.lower() for t in types))
                raise UnsupportedError(
                    f"{spec.ffn.path}: its weights are {names}; an ONNX file is converted with "
                    "weights in float32 or float16"
                )
        return plan

    @cached_property
    def size(self) -> tuple[int, int]:
        """How many parameters it has, and the bytes of one; of the dense graph, so asked early."""
        sizes = [_floats(v.const_value) for v in self.model.graph.initializers.values()]
        sizes += [
            _floats(node.attributes["value"].as_tensor())
            for node in self.model.graph.all_nodes()
            if node.op_type == "Constant" and "value" in node.attributes
        ]
        items = [item for _, item in sizes if item]
        return sum(count for count, _ in sizes), max(items, default=4)


def open_onnx(model: str, inputs: Any, options: Mapping[str, object]) -> OnnxSource:
    """The source for a MODEL that ends in ``.onnx``, and what ``--inputs`` returned.

    `options` are those that do not apply to a file, and their values.

    Raises:
        UsageError: there is no such file, or an option does not apply.
    """
    for option, value in options.items():
        if value:
            raise UsageError(f"`{option}`: it does not apply to an ONNX file; leave it out")
    path = Path(model)
    if not path.is_file():
        raise UsageError(f"{model}: there is no such file")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise UsageError(
            "`example_inputs`: for an ONNX file it returns a dict of arrays by input name"
        )
    example = {name: np.asarray(array) for name, array in inputs.items()} if inputs else None
    return OnnxSource(path, example)


def _floats(tensor: ir.TensorProtocol | None) -> tuple[int, int]:
    """How many parameters a tensor holds, and the bytes of one; a scalar is not a parameter."""
    if tensor is None or tensor.size <= 1 or not tensor.dtype.is_floating_point():
        return 0, 0
    dtype = TORCH_TYPES.get(tensor.dtype)
    return int(tensor.size), 0 if dtype is None else dtype.itemsize
