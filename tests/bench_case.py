"""What another process does with a model: it imports these by name."""

import os
from collections.abc import Callable
from pathlib import Path

import torch


def note(model: torch.Tensor, file: Path) -> Callable[[], object]:
    file.write_text(f"{os.getpid()} {torch.get_num_threads()} {torch.is_grad_enabled()}")
    return model.sum


def broken(model: torch.Tensor, inputs: object) -> Callable[[], object]:
    raise ValueError("nothing to run")
