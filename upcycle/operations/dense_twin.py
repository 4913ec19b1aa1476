"""The dense architecture behind a mixture of experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from upcycle.conversion.trained import dense_class_of
from upcycle.errors import UnsupportedError
from upcycle.layers.moe import MoE
from upcycle.layers.pretrained import UpcycledModel
from upcycle.models.configuration import class_named
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import DenseArchitecture, NativeTarget

# Fields with one of these in their names say how experts are made, chosen or trained.
_OF_EXPERTS = (
    "expert",
    "router",
    "moe",
    "topk",
    "top_k",
    "sparse",
    "mlp_",
    "group",
    "aux",
    "nextn",
)
_OF_THE_FILE = ("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class DenseTwin:
    """A dense class that computes all that a mixture computes but its experts.

    Attributes:
        is_certain: the mixture extends this very class; else it has to be compared.
    """

    model_class: Any
    config: Any
    is_certain: bool

    def skeleton(self) -> Any:
        """A model on the meta device."""
        with torch.device("meta"):
            return self.model_class(self.config)

    def make(self, dtype: torch.dtype) -> Any:
        """A model with weights yet to be written, in eval mode."""
        with no_init_weights():
            return self.model_class._from_config(self.config, dtype=dtype).eval()


def dense_twins(model: nn.Module, d_ff: int) -> Iterator[DenseTwin]:
    """The dense classes that may be behind `model`, the likeliest first.

    Args:
        d_ff: of the dense FFNs, for a native model, whose configuration has that of its experts.

    Raises:
        UnsupportedError: none is known, or none has a place for what is configured.
    """
    if isinstance(model, UpcycledModel):
        yield DenseTwin(*dense_class_of(model), is_certain=True)
        return
    config: Any = getattr(model, "config", None)
    if config is not None and any(isinstance(module, MoE) for module in model.modules()):
        yield DenseTwin(type(model), config, is_certain=True)  # converted in memory
        return
    kind = getattr(config, "model_type", type(model).__name__)
    target = NATIVE.get(kind)
    if target is None or type(model).__name__ != target.architecture:
        raise UnsupportedError(
            f"{type(model).__name__}: no dense architecture is known that computes the rest of a "
            f"{kind}; known are {', '.join(NATIVE)}"
        )
    reasons = []
    for name, source in target.sources.items():
        if unknown := _without_place(target, source, config):
            reasons.append(f"{name} has no place for {unknown}")
            continue
        model_class = class_named(source.architecture)
        if model_class is not None:
            yield DenseTwin(model_class, _config(model_class, config, source, d_ff), False)
    if len(reasons) == len(target.sources):
        raise UnsupportedError(
            f"{type(model).__name__}: no dense architecture behind a {kind} computes the rest of "
            f"it: {'; '.join(reasons)}"
        )


def _without_place(
    target: NativeTarget, source: DenseArchitecture, config: PreTrainedConfig
) -> str | None:
    """A field that the dense architecture does not read, set to something."""
    default: Any = type(config)()
    kept = {*source.common, *source.carried, "rope_parameters", "dtype", "layer_types"}
    kept |= set(vars(PreTrainedConfig())) | {"hidden_act", "intermediate_size", target.width}
    for name, value in vars(config).items():
        if name in kept or any(word in name for word in _OF_EXPERTS):
            continue
        usual = target.constants.get(name, getattr(default, name, None))
        if value != usual and value:
            return f"{name}={value}"
    return None


def _config(
    model_class: Any, config: PreTrainedConfig, source: DenseArchitecture, d_ff: int
) -> Any:
    config_class = model_class.config_class
    known = config_class().to_dict()
    there = {
        name: value
        for name, value in config.to_dict().items()
        if name in known and name not in _OF_THE_FILE
    }
    there |= {"intermediate_size": d_ff, "architectures": [source.architecture]}
    return config_class.from_dict(there)
