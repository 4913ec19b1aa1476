"""Read one MoE layer back from a written checkpoint, by offsets, without loading the rest."""

import math
from pathlib import Path

import numpy as np
import torch

from upcycle.ir.layer_weights import empty_layer, weights_of
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import MoEWeights
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.files.stored import Stored
from upcycle.targets.native.tensors import read_native


def read_stored(directory: Path, stored: Stored) -> torch.Tensor:
    """A tensor that lies in a file of `directory`, mapped: what is written to it is not kept."""
    count = math.prod(stored.shape) * stored.dtype.itemsize
    if not count:
        return torch.empty(stored.shape, dtype=stored.dtype)
    file = directory / stored.file
    data = np.memmap(file, np.uint8, mode="c", offset=stored.offset, shape=(count,))
    return torch.from_numpy(data).view(stored.dtype).reshape(stored.shape)


def read_layer(directory: Path, written: Checkpoint, spec: MoESpec) -> MoEWeights:
    """The weights of one layer as they are on disk; without their provenance.

    Args:
        directory: where the checkpoint was written.
        written: what `write_checkpoint` returned.
        spec: the layer.
    """

    def read(name: str) -> torch.Tensor:
        return read_stored(directory, written.stored[name])

    if written.target is not None:
        return read_native(written.target, spec, read)
    site = spec.site()
    path = site["path"] if site["placement"] == "module" else site["contraction"]
    layer = empty_layer(spec.layer_config())
    held = {name: read(f"{path}.{name}") for name in layer.state_dict()}
    layer.load_state_dict(held, assign=True)
    return weights_of(layer)
