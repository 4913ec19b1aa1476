"""Read one MoE layer back from a written checkpoint, by offsets, without loading the rest."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from upcycle.ir.layer_weights import empty_layer, weights_of
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import MoEWeights
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.tensors import read_native

Read = Callable[[str], torch.Tensor]
_EXPERT = re.compile(r"(.*\.experts\.(?:expert_)?)(\d+)\.(.*)")


def read_by_name(*sources: Path) -> Read:
    """Tensors, and the stacks of experts' matrices, by name (see `Stacks.stacked`).

    Args:
        sources: checkpoint directories, or safetensors files.
    """
    home = {name: tensors for tensors in map(read_tensors, sources) for name in tensors}
    stacks: dict[str, dict[int, str]] = {}
    for name in home:
        if found := _EXPERT.fullmatch(name):
            before, number, after = found.groups()
            stacks.setdefault(before + after, {})[int(number)] = name

    def read(name: str) -> torch.Tensor:
        if name in home:
            return home[name][name]
        parts = [part for _, part in sorted(stacks[name].items())]
        return torch.stack([home[part][part] for part in parts])

    return read


def read_layer(target: NativeTarget | None, spec: MoESpec, read: Read) -> MoEWeights:
    """The weights of one layer in a checkpoint, native or not; without their provenance."""
    if target is not None:
        return read_native(target, spec, read)
    return read_at(spec.ffn.place, spec, read)


def read_at(path: str, spec: MoESpec, read: Read) -> MoEWeights:
    """The same for a layer whose tensors have their names in `MoE`, after `path`."""
    layer = empty_layer(spec.layer_config())
    tensors = {name: read(f"{path}.{name}") for name in layer.state_dict()}
    layer.load_state_dict(tensors, assign=True)
    return weights_of(layer)
