"""Calibrate a model that does not fit in memory: its weights stay in the files, mapped.

The module is real and its parameters are views of the memory map, so the pages of a block can be
dropped once the batches have passed it. The weights of each layer that is made go to a file at
once, and in sequential mode come back from it, mapped as well, while the batches pass.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from upcycle.data.calibration import CalibrationData
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.layer_weights import empty_layer, layer_tensors, weights_of
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, MoEWeights, Provenance, read_ffn
from upcycle.layers.moe import MoE
from upcycle.passes.calibrate.calibrate import calibrate
from upcycle.passes.calibrate.usage import usage
from upcycle.passes.rewrite import with_empty_layers
from upcycle.passes.transform.transform import transform
from upcycle.util.memory import give_back
from upcycle.util.progress import Progress


class Spool:
    """The weights of layers, each in a file of its own in `directory`."""

    def __init__(self, directory: Path, specs: Sequence[MoESpec]) -> None:
        directory.mkdir(exist_ok=True)
        self._file = {spec.ffn.path: directory / f"{i}.safetensors" for i, spec in enumerate(specs)}
        self.provenance: dict[str, Provenance] = {}

    def put(self, spec: MoESpec, made: MoEWeights) -> None:
        """Write the weights; of where they come from, only the numbers of neurons are kept."""
        tensors = {name: tensor.contiguous() for name, tensor in made.tensors().items()}
        save_file(tensors, self._file[spec.ffn.path])
        self.provenance[spec.ffn.path] = made.provenance

    def get(self, spec: MoESpec) -> MoEWeights:
        """The weights as they were put, memory-mapped."""
        layer = empty_layer(spec.layer_config())
        layer.load_state_dict(load_file(self._file[spec.ffn.path]), assign=True)
        return weights_of(layer, self.provenance[spec.ffn.path])


def calibrate_mapped(
    model: nn.Module, plan: Plan, data: CalibrationData, spool: Spool, progress: Progress
) -> dict[str, Any]:
    """Make every layer of `plan` into `spool`, and return the calibration part of the report.

    Memory: what `upcycle.passes.calibrate.calibrate` says, where weights are mapped and not held.

    Args:
        model: the dense model with mapped weights; it is used up.
        plan: what each FFN becomes.
        data: inputs of the model.
        spool: takes the layers.
        progress: called after each layer.
    """
    parameters: Mapping[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    converted, layers = with_empty_layers(model, plan.specs, in_place=True)
    dtype = parameters[plan.specs[0].ffn.parameters[0]].dtype
    for layer in layers:
        as_stored(layer, dtype)
    sequential = plan.recipe.calibration.sequential
    rows: list[dict[str, Any]] = []
    filled: list[MoE] = []

    def visit(spec: MoESpec, layer: MoE, ffn: FFNWeights, seen: FFNInputs) -> None:
        while filled:  # all batches have passed it
            filled.pop().to("meta")
        made = transform(ffn, spec, seen)
        rows.append(usage(spec, ffn, made, seen))
        spool.put(spec, made)
        if sequential:
            layer.load_state_dict(layer_tensors(layer, spool.get(spec)), assign=True, strict=False)
            filled.append(layer)
        give_back()
        progress("converting", len(rows), len(plan.specs))

    calibrate(
        converted,
        list(zip(plan.specs, layers, strict=True)),
        data.batches,
        dense=lambda spec: read_ffn(spec.ffn, parameters),
        visit=visit,
        sequential=sequential,
        domains=data.domains,
    )
    return data.describe(sequential=sequential) | {"layers": rows}


def as_stored(layer: MoE, dtype: torch.dtype) -> None:
    """The layer in the dtype of its model; the router is never below float32."""
    layer.to(dtype)
    layer.router.to(torch.promote_types(dtype, torch.float32))
