"""What kind of numbers a module holds, and the modes it runs in for the time of a block."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import OptimizedModule


def model_dtype(model: nn.Module) -> torch.dtype:
    """The float dtype of the weights; float32 if there are none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def class_of(model: nn.Module) -> str:
    """What reports call the class: of a graph, that of the module which it was made from."""
    kind = type(model)
    return kind.__name__ if isinstance(model, fx.GraphModule) else kind.__qualname__


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are; the CPU if there are none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of what torch.compile, DataParallel and DDP make of one."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, parallel):
            model = model.module
        else:
            return model


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Every module inside `models` is in eval mode, and afterwards in the mode that it had."""
    before = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


def set_within(undo: ExitStack, holder: Any, name: str, value: Any) -> None:
    """Set an attribute until `undo` is closed."""
    undo.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder calls its modules one by one: fused, it hides its linear maps."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
