"""Where on disk a tensor already is.

The writers of checkpoints make these, so that other files can point at the numbers.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stored:
    """A row-major tensor inside a file of the output directory.

    Attributes:
        file: the file, relative to the output directory.
        offset: first byte, counted from the start of the file.
        shape: its shape; a stack of tensors that follow each other without a gap is one tensor too.
        dtype: its element type.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
