"""What kind of numbers a module holds, and where."""

import torch
from torch import nn


def model_dtype(model: nn.Module) -> torch.dtype:
    """The float dtype of the weights; float32 if there are none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are; the CPU if there are none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
