"""Types and numbers of ONNX tensors in torch."""

import numpy as np
import onnx_ir as ir
import torch

ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
}
TORCH_TYPES = {onnx: dtype for dtype, onnx in ONNX_TYPES.items()}


def numbers_of(value: ir.Value | None) -> torch.Tensor:
    """The numbers of an initializer that has some, in a type of torch."""
    tensor = None if value is None else tensor_of(value)
    assert tensor is not None
    return tensor


def tensor_of(value: ir.Value) -> torch.Tensor | None:
    """The numbers of an initializer, or None if its type has no torch equivalent."""
    const = value.const_value
    raw = getattr(const, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    if const is None or const.dtype not in ONNX_TYPES.values():
        return None
    array = const.numpy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
