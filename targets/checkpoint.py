"""Write a converted model as safetensors, in the most widely readable form that holds it exactly.

A transformers model becomes its native MoE architecture where one fits, else the dense architecture
with a self-contained modeling file. Any other module becomes ``model.safetensors`` and
``upcycle.json``, which `upcycle.load` reads.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.ir.layer_weights import layer_tensors, weights_of
from upcycle.ir.report import CheckpointFacts
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import MoEWeights
from upcycle.layers.moe import MoE
from upcycle.targets import remote_code
from upcycle.targets.destination import Destination, destination
from upcycle.targets.files.stored import Stored
from upcycle.targets.files.tensor_file import MAX_SHARD_SIZE, ShardLog, TensorEntry, write_tensors
from upcycle.targets.native.choose import build_config
from upcycle.targets.native.tensors import OneLayer, entries
from upcycle.util.copies import tensors_of, untied_tensors
from upcycle.util.lazy_tensors import LazyTensors
from upcycle.util.modules import class_of
from upcycle.version import __version__

UPCYCLE_JSON = "upcycle.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was written.

    Attributes:
        destination: the form.
        architecture: the model type in config.json, or the class of the module.
        stored: where every tensor is.
        auto_class: the Auto class of transformers that loads it.
    """

    destination: Destination
    architecture: str
    stored: dict[str, Stored]
    auto_class: str = "AutoModel"

    def facts(self) -> CheckpointFacts:
        """For ``report.json``."""
        form, reasons = self.destination.form, dict(self.destination.reasons)
        runtimes = {name: found.to_json() for name, found in self.destination.runtimes.items()}
        return CheckpointFacts(form, self.architecture, reasons, runtimes)


@dataclass(frozen=True)
class Content:
    """Where the numbers of a converted model come from.

    Attributes:
        tensor: a tensor outside the converted FFNs, by its name in the module.
        layer: the weights of one MoE layer; asked for once, in the order of writing.
    """

    tensor: Callable[[str], torch.Tensor]
    layer: Callable[[MoESpec], MoEWeights]


def content_of(model: nn.Module, plan: Plan) -> Content:
    """The numbers that a converted module holds now, trained or not."""
    state = tensors_of(model)
    layers = {spec.ffn.path: layer for spec, layer in planned_layers(model, plan)}
    return Content(
        tensor=lambda name: state[name].detach().cpu().contiguous(),
        layer=lambda spec: weights_of(layers[spec.ffn.path]),
    )


def write_checkpoint(
    directory: Path,
    model: nn.Module,
    plan: Plan,
    *,
    content: Content | None = None,
    factory: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    log: ShardLog | None = None,
) -> Checkpoint:
    """Write the weights and the configuration of a converted model.

    Args:
        directory: exists; a generation config that it has is not replaced.
        model: the converted module: names, order, shapes and configuration. On the meta device,
            with `content`, the numbers are never in memory together.
        plan: how it was made.
        content: the numbers; those of `model` if None.
        factory: ``package.module:callable`` that builds the dense module, for `upcycle.load`.
        max_shard_size: bytes of one file.
        log: knows the files of an interrupted run that are complete.

    Raises:
        UnsupportedError: nothing that holds the model is what the plan requires.
    """
    content = content or content_of(model, plan)
    chosen = destination(model, plan)
    target = chosen.target
    if target is not None:
        config: Any = model.config
        made = entries(target, _dense_names(model, plan, content), plan, content.layer, config)
    else:
        made = _module_entries(model, plan, content)
    stored = write_tensors(directory, made, max_shard_size=max_shard_size, log=log)
    if not isinstance(model, PreTrainedModel):
        description = {
            "upcycle": __version__,
            "factory": factory,
            "class": f"{type(model).__module__}.{class_of(model)}",
            "sites": [spec.site() for spec in plan.specs],
        }
        _write_json(directory / UPCYCLE_JSON, description)
        return Checkpoint(chosen, type(model).__name__, stored)
    if target is not None:
        config = build_config(target, model.config, plan, dtype=model.dtype)
        auto_class = target.auto_class
        architecture = target.model_type
    else:
        config = remote_code.build_config(model, plan)
        (directory / remote_code.FILE).write_text(
            remote_code.modeling_file(model, plan), encoding="utf-8"
        )
        auto_class = remote_code.auto_classes(model)[0]
        architecture = config["model_type"]
    _write_json(directory / "config.json", config)
    generation = getattr(model, "generation_config", None)
    path = directory / "generation_config.json"
    if model.can_generate() and generation is not None and not path.exists():
        _write_json(path, generation.to_diff_dict())
    return Checkpoint(chosen, architecture, stored, auto_class)


def planned_layers(model: nn.Module, plan: Plan) -> Iterator[tuple[MoESpec, MoE]]:
    """Each planned layer with the module that it became."""
    for spec in plan.specs:
        layer = model.get_submodule(spec.ffn.place)
        assert isinstance(layer, MoE)
        yield spec, layer


def _dense_names(model: nn.Module, plan: Plan, content: Content) -> LazyTensors:
    """The converted model under the names of the dense one.

    A tensor of a converted FFN is there by name only: as an empty tensor of the right dtype.
    """
    replaced: dict[str, torch.dtype] = {}
    for spec, layer in planned_layers(model, plan):
        replaced |= dict.fromkeys(spec.ffn.parameters, layer.experts.down_proj.dtype)
    inside = tuple(f"{spec.ffn.path}." for spec in plan.specs)
    outside = {name for name in untied_tensors(model) if not name.startswith(inside)}

    def read(name: str) -> torch.Tensor:
        return torch.empty(0, dtype=replaced[name]) if name in replaced else content.tensor(name)

    def by_number(name: str) -> list[tuple[int, int | str]]:
        return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]

    return LazyTensors(sorted([*outside, *replaced], key=by_number), read)


def _module_entries(model: nn.Module, plan: Plan, content: Content) -> Iterator[TensorEntry]:
    """Every tensor under its name in the converted module; one layer's weights at a time."""
    paths = {layer: path for path, layer in model.named_modules() if isinstance(layer, MoE)}
    layer_of = {paths[layer]: (spec, layer) for spec, layer in planned_layers(model, plan)}
    kept = {kept.name for spec in plan.specs for kept in spec.ffn.kept}
    one_layer = OneLayer(content.layer)

    def part(spec: MoESpec, layer: MoE, name: str) -> torch.Tensor:
        return layer_tensors(layer, one_layer(spec))[name].detach().cpu().contiguous()

    for name, tensor in untied_tensors(model).items():
        path = next((p for p in layer_of if name.startswith(f"{p}.")), None)
        if path is None or name in kept:
            read = partial(content.tensor, name)
            tensor = read()
        else:
            read = partial(part, *layer_of[path], name.removeprefix(f"{path}."))
        yield TensorEntry(name, tuple(tensor.shape), tensor.dtype, read)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
