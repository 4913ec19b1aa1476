"""Write a converted model as safetensors, in the most widely readable form that holds it exactly.

A transformers model becomes its native MoE architecture where one fits, else the dense architecture
with a self-contained modeling file. Any other module becomes ``model.safetensors`` and
``upcycle.json``, which `upcycle.load` reads.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.moe import MoE
from upcycle.spec import MoESpec, Plan
from upcycle.targets import remote_code
from upcycle.targets.native import NATIVE
from upcycle.targets.native.native import NativeTarget, build_config, choose, entries
from upcycle.targets.stored import Stored
from upcycle.targets.tensor_file import MAX_SHARD_SIZE, TensorEntry, write_tensors
from upcycle.version import __version__
from upcycle.weights import ExpertWeights, MoEWeights, RouterWeights

UPCYCLE_JSON = "upcycle.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was written.

    Attributes:
        form: ``native``, ``remote_code`` or ``module``.
        architecture: the model type in config.json, or the class of the module.
        stored: where every tensor is.
        reasons: why each native architecture was not chosen.
        auto_class: the Auto class of transformers that loads it.
    """

    form: str
    architecture: str
    stored: dict[str, Stored]
    reasons: dict[str, str] = field(default_factory=dict)
    auto_class: str = "AutoModel"
    runtimes: Mapping[str, str] = field(default_factory=dict)


def native_target(dense: nn.Module, plan: Plan) -> tuple[NativeTarget | None, dict[str, str]]:
    """The native architecture that holds the plan, or None; and why the others do not."""
    if not isinstance(dense, PreTrainedModel):
        return None, {}
    config = copy.deepcopy(dense.config)
    config.architectures = [type(dense).__name__]  # a model built in memory does not say it
    return choose(NATIVE, config, plan)


def write_checkpoint(
    directory: Path,
    model: nn.Module,
    plan: Plan,
    *,
    factory: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Checkpoint:
    """Write the weights and the configuration of a converted model.

    Args:
        directory: exists, and receives the files; a generation config that it has is kept.
        model: the converted module; what it holds now is written, trained or not.
        plan: how it was made.
        factory: ``package.module:callable`` that builds the dense module, for `upcycle.load`.
        max_shard_size: bytes of one file.
    """
    layers = {spec.ffn.path: layer for spec, layer in planned_layers(model, plan)}
    if not isinstance(model, PreTrainedModel):
        stored = write_tensors(directory, _module_entries(model), max_shard_size=max_shard_size)
        description = {
            "upcycle": __version__,
            "factory": factory,
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "sites": [spec.site() for spec in plan.specs],
        }
        _write_json(directory / UPCYCLE_JSON, description)
        return Checkpoint("module", type(model).__name__, stored)
    target, reasons = native_target(model, plan)
    if target is not None:
        tensors = _DenseNames(model, plan)
        made = entries(target, tensors, plan, lambda spec: weights_of(layers[spec.ffn.path]))
        stored = write_tensors(directory, made, max_shard_size=max_shard_size)
        config = build_config(target, model.config, plan, dtype=model.dtype)
        auto_class = "AutoModelForCausalLM"
        form, architecture = "native", target.model_type
    else:
        stored = write_tensors(directory, _module_entries(model), max_shard_size=max_shard_size)
        config = remote_code.build_config(model, plan)
        (directory / remote_code.FILE).write_text(
            remote_code.modeling_file(model), encoding="utf-8"
        )
        auto_class = remote_code.auto_classes(model)[0]
        form, architecture = "remote_code", config["model_type"]
    _write_json(directory / "config.json", config)
    generation = getattr(model, "generation_config", None)
    path = directory / "generation_config.json"
    if model.can_generate() and generation is not None and not path.exists():
        _write_json(path, generation.to_diff_dict())
    runtimes = target.runtimes if target else {}
    return Checkpoint(form, architecture, stored, reasons, auto_class, runtimes)


def planned_layers(model: nn.Module, plan: Plan) -> Iterator[tuple[MoESpec, MoE]]:
    """Each planned layer with the module that it became."""
    for spec in plan.specs:
        site = spec.site()
        where = site["path"] if site["placement"] == "module" else site["contraction"]
        layer = model.get_submodule(where)
        assert isinstance(layer, MoE)
        yield spec, layer


def weights_of(layer: MoE) -> MoEWeights:
    """The tensors of a layer, as they are now and without a copy; without their provenance."""
    experts = layer.experts
    shape = (experts.num_experts, experts.intermediate_dim)
    bias = layer.router.bias
    return MoEWeights(
        experts=ExpertWeights(
            up_EGD=experts.up_EGD.detach(),
            up_bias_EG=None if experts.up_bias_EG is None else experts.up_bias_EG.detach(),
            down_EOI=experts.down_proj.detach(),
            neuron_EI=torch.full(shape, -1),
        ),
        router=RouterWeights(layer.router.weight.detach(), None if bias is None else bias.detach()),
        output_bias_O=None if layer.output_bias is None else layer.output_bias.detach(),
    )


class _DenseNames(Mapping[str, torch.Tensor]):
    """The converted model under the names of the dense one.

    A tensor of a converted FFN is there by name only: as an empty tensor of the right dtype.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        replaced = {spec.ffn.parameters[0]: spec for spec in plan.specs}
        self._tensors: dict[str, torch.Tensor] = {}
        layer_of = {spec.ffn.path: layer for spec, layer in planned_layers(model, plan)}
        inside = {f"{spec.ffn.path}." for spec in plan.specs}
        state = {n: t for n, t in _untied(model).items() if not n.startswith(tuple(inside))}
        names = [*state, *replaced]
        for name in sorted(names, key=_natural):
            if name in replaced:
                spec = replaced[name]
                dtype = layer_of[spec.ffn.path].experts.down_proj.dtype
                for parameter in spec.ffn.parameters:
                    self._tensors[parameter] = torch.empty(0, dtype=dtype)
            else:
                self._tensors[name] = state[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _module_entries(model: nn.Module) -> Iterator[TensorEntry]:
    for name, tensor in _untied(model).items():
        yield TensorEntry(name, tuple(tensor.shape), tensor.dtype, partial(_on_cpu, tensor))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, without the tensors that transformers ties to another one on loading."""
    state = dict(model.state_dict())
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {
        name: tensor
        for name, tensor in state.items()
        if tied.get(name) not in state or tensor.data_ptr() != state[tied[name]].data_ptr()
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
