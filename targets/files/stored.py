"""Where on disk a tensor already is, so that other files can point at it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_stored(directory: Path, stored: Stored) -> torch.Tensor:
    """A tensor that lies in a file of `directory`, mapped: what is written to it is not kept."""
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    file, shape = directory / stored.file, (stored.nbytes,)
    data = np.memmap(file, np.uint8, mode="c", offset=stored.offset, shape=shape)
    return torch.from_numpy(data).view(stored.dtype).reshape(stored.shape)
