"""Hold what a checkpoint stores against the model that its configuration describes.

A conversion in memory, one piece by piece and a plan refuse the same, by these functions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from upcycle.errors import UnsupportedError, UsageError
from upcycle.util.copies import tensors_of
from upcycle.util.lazy_tensors import LazyTensors

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DeepSpeed",
    "base_model.model.": "PEFT",
}


@dataclass(frozen=True)
class Fit:
    """The tensors of a checkpoint by the names of the module, and the names that nothing reads.

    Attributes:
        tensors: read when they are asked for; a parameter that is not finite is refused then.
        unread: as the checkpoint has them.
    """

    tensors: Mapping[str, torch.Tensor]
    unread: tuple[str, ...]


def fit(directory: Path, stored: Mapping[str, torch.Tensor], skeleton: nn.Module) -> Fit | str:
    """The tensors that belong to a module; a prefix of the base model is seen through.

    Args:
        directory: of the checkpoint, for messages.
        stored: its tensors; only their shapes and dtypes are looked at.
        skeleton: the module, on any device.

    Returns:
        What belongs together; or, if the checkpoint has other names than the module, a parameter
        that was not found: transformers may know how to rename them.

    Raises:
        UsageError: a tensor has another shape than the module's, or an integer type in the place of
            floats; or all names have the prefix of a wrapper.
        UnsupportedError: it is in 8-bit floats.
    """
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    state = tensors_of(skeleton)
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}

    def add(name: str) -> str:
        return prefix + name

    def remove(name: str) -> str:
        return name.removeprefix(prefix)

    ways: tuple[Callable[[str], str], ...] = (str, add, remove)
    for stored_name in ways:
        names = {name: stored_name(name) for name in state if stored_name(name) in stored}
        if lacking(names, skeleton) is not None:
            continue
        for name, there in names.items():
            _check(directory, there, stored[there], state[name])

        def read(name: str, names: Mapping[str, str] = names) -> torch.Tensor:
            tensor = stored[names[name]]
            if name in parameters:
                check_finite(directory, {names[name]: tensor}.items())
            return tensor

        unread = sorted(set(stored) - set(names.values()))
        return Fit(LazyTensors(names, read), tuple(unread))
    for wrapper, by in WRAPPERS.items():
        if stored and all(name.startswith(wrapper) for name in stored):
            raise UsageError(
                f"{directory}: the names of its tensors begin with `{wrapper}`, as {by} writes "
                "them; save the model inside, or rename them"
            )
    return str(lacking(stored, skeleton))


def lacking(names: Iterable[str], module: nn.Module) -> str | None:
    """The first parameter of `module` that is not there, if any; tied ones need not be."""
    there = set(names)
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    wanted = (name for name, _ in module.named_parameters() if name not in tied)
    return next((name for name in wanted if name not in there), None)


def stored_apart(stored: Mapping[str, torch.Tensor], skeleton: nn.Module) -> bool:
    """Whether tensors that the configuration ties are both stored, and differ."""
    tied: Mapping[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    pairs = ((a, b) for a, b in tied.items() if a in stored and b in stored)
    return any(not torch.equal(stored[a], stored[b]) for a, b in pairs)


def check_finite(where: object, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise UsageError for a tensor with NaN or infinity in it."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        if not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
            raise UsageError(
                f"{where}: {name} of the dense model has NaN or infinity in it; mend the model "
                "first"
            )


def _check(directory: Path, name: str, stored: torch.Tensor, wanted: torch.Tensor) -> None:
    if stored.shape != wanted.shape:
        raise UsageError(
            f"{directory}: {name} is {list(stored.shape)} in the file and {list(wanted.shape)} by "
            "config.json; one of the two belongs to another model"
        )
    if wanted.is_floating_point() and not stored.is_floating_point():
        kind = str(stored.dtype).removeprefix("torch.")
        raise UsageError(
            f"{directory}: {name} is stored as {kind}, and the model computes with floats there; "
            "the file is damaged, or quantised in a way that config.json does not say"
        )
    if stored.is_floating_point() and stored.dtype.itemsize == 1:
        kind = str(stored.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{directory}: its weights are quantised ({name} is {kind}); dequantise them and save "
            "the model first"
        )
