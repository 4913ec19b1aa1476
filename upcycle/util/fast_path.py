"""Torch's fused transformer layer, which hides the linear maps of a model in one call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Within it nn.TransformerEncoder calls its modules one by one."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
