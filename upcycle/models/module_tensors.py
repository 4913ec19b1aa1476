"""The tensors of a checkpoint under the names that the module has for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from upcycle.models.checkpoint_tensors import read_tensors


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
        renamed = Renamed(tensors, {name: rename(name) for name in skeleton.state_dict()})
        if lacking(renamed, skeleton) is None:
            return renamed
    return str(lacking(tensors, skeleton))


class Renamed(Mapping[str, torch.Tensor]):
    """Tensors under other names: `names` are new name -> stored name, of which some may exist."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = {name: stored for name, stored in names.items() if stored in tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
