"""The tensors of a checkpoint under the names that the module has for them."""

from collections.abc import Callable, Mapping
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

    Returns:
        Tensor by the name in `skeleton`, for all that are there; or, if the checkpoint has other
        names than the module, a parameter that was not found.
    """
    tensors = read_tensors(directory)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."

    def renamed(stored_name: Callable[[str], str]) -> LazyTensors:
        present = (name for name in skeleton.state_dict() if stored_name(name) in tensors)
        return LazyTensors(present, lambda name: tensors[stored_name(name)])

    for stored_name in (str, prefix.__add__, lambda name: name.removeprefix(prefix)):
        found = renamed(stored_name)
        if lacking(found, skeleton) is None:
            return found
    return str(lacking(tensors, skeleton))
