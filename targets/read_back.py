"""Read one MoE layer back from a written checkpoint, by offsets, without loading the rest."""

import math
from pathlib import Path

import numpy as np
import torch

from upcycle.spec import MoESpec
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.native import NATIVE
from upcycle.targets.native.layers import layer_index
from upcycle.targets.native.tensors import stack_names
from upcycle.targets.stored import Stored
from upcycle.weights import ExpertWeights, MoEWeights, RouterWeights


def read_stored(directory: Path, stored: Stored) -> torch.Tensor:
    """A copy of a tensor that lies in a file of `directory`."""
    count = math.prod(stored.shape) * stored.dtype.itemsize
    data = np.fromfile(directory / stored.file, np.uint8, count, offset=stored.offset)
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

    def optional(name: str) -> torch.Tensor | None:
        return read(name) if name in written.stored else None

    padding = torch.full((spec.num_experts, spec.width), -1)
    if written.form == "native":
        target = NATIVE[written.architecture]
        router, *matrices = stack_names(target, layer_index(spec.ffn))
        gate_EID, up_EID, down_EDI = (read(name) for name in matrices)
        experts = ExpertWeights(torch.cat([gate_EID, up_EID], dim=1), None, down_EDI, padding)
        return MoEWeights(experts, RouterWeights(read(router).float()), None)
    site = spec.site()
    path = site["path"] if site["placement"] == "module" else site["contraction"]
    up = f"{path}.experts." + ("up_proj" if spec.ffn.pointwise.arity == 1 else "gate_up_proj")
    experts = ExpertWeights(
        up_EGD=read(up),
        up_bias_EG=optional(f"{up}_bias"),
        down_EOI=read(f"{path}.experts.down_proj"),
        neuron_EI=padding,
    )
    router_weights = RouterWeights(read(f"{path}.router.weight"), optional(f"{path}.router.bias"))
    return MoEWeights(experts, router_weights, optional(f"{path}.output_bias"))
