"""Training mode and eval mode of modules, for the time of a measurement."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
