"""The tensors of a checkpoint under the names that the module has for them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.util.lazy_tensors import LazyTensors


def lacking(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> str | None:
    """The first parameter of `module` that is not there, if any; tied ones need not be."""
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    names = (name for name, _ in module.named_parameters() if name not in tied)
    return next((name for name in names if name not in tensors), None)


def by_module_name(directory: Path, skeleton: nn.Module) -> Mapping[str, torch.Tensor] | str:
    """The memory-mapped tensors of a directory; a prefix of the base model is seen through.

    Args:
        directory: of safetensors files.
        skeleton: the module, on the meta device.

    Returns:
        Tensor by the name in `skeleton`, for all that are there; or, if the checkpoint has other
        names than the module, a parameter that was not found.
    """
    tensors = read_tensors(directory)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    for rename in (str, lambda n: prefix + n, lambda n: n.removeprefix(prefix)):
        renamed = _renamed(tensors, {name: rename(name) for name in skeleton.state_dict()})
        if lacking(renamed, skeleton) is None:
            return renamed
    return str(lacking(tensors, skeleton))


def _renamed(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> LazyTensors:
    """Tensors under other names: `names` are new name -> stored name, of which some may exist."""
    there = (name for name, stored in names.items() if stored in tensors)
    return LazyTensors(there, lambda name: tensors[names[name]])
