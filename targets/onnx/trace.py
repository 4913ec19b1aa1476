"""Torch's exporter: a module in, a graph out, without its messages."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import _trace

from upcycle.errors import UnsupportedError, first_line
from upcycle.onnx.nodes import OPSET
from upcycle.targets.onnx.torch_ops import opaque
from upcycle.targets.onnx.torch_ops.attention import attention
from upcycle.targets.traced.axes import Axes
from upcycle.util.modules import no_fast_path
from upcycle.util.quiet import quiet_logs

_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    **opaque.TABLE,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


def trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Axes,
    *,
    optimize: bool = True,
) -> torch.onnx.ONNXProgram:
    """The graph of `model.forward`, in eval mode, for example `inputs` by name.

    Of those the `axes` may vary. `optimize` folds what follows from weights and constants.

    Raises:
        UnsupportedError: torch cannot export the model.
    """
    shapes = {name: dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) for name in inputs}
    # With gradients torch takes another attention kernel while tracing than for its decompositions.
    with quiet(), no_fast_path(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model,
                kwargs=dict(inputs),
                dynamic_shapes=shapes,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=optimize,
                custom_translation_table=_TABLE,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)
            raise UnsupportedError(f"torch.onnx cannot export this model: {reason}") from error
    assert program is not None
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch's exporter says about itself: deprecations, and packages it does without."""
    with quiet_logs("torch.onnx", "torch.fx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", module=r"torch\.|onnxscript\.")
        vars(_trace)["print"] = lambda *_, **__: None  # of all of a graph that it refuses
        try:
            yield
        finally:
            vars(_trace).pop("print", None)
