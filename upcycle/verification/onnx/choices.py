"""The experts that the ONNX files of a model choose, read from the weights of their nodes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from upcycle.layers.moe import MoE
from upcycle.onnx.inputs import Array
from upcycle.targets.onnx.parts import FILES

# For each layer the file, and the name of the weights [T, E] there, each time that it runs.
ChoiceNames = Mapping[MoE, Sequence[tuple[str, str]]]


def inner_choices(directory: Path, model: nn.Module) -> ChoiceNames:
    """Where the files in `directory` hold the weights of the experts; empty if a layer has none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    # As `upcycle.onnx.node_names` names the node that `symbolic` makes.
    ends = {path: re.escape("/".join([*path.split("."), "experts"]).lstrip("/")) for path in layers}
    found: dict[MoE, list[tuple[str, str]]] = {layer: [] for layer in layers.values()}
    for file in FILES:
        if not (directory / file).is_file():
            continue
        nodes = onnx.load(directory / file, load_external_data=False).graph.node
        scatters = [node for node in nodes if node.op_type == "ScatterElements"]
        for path, layer in layers.items():
            pattern = re.compile(rf"{ends[path]}/ScatterElements(_\d+)?")
            found[layer] += [(file, n.output[0]) for n in scatters if pattern.fullmatch(n.name)]
    return found if all(found.values()) else {}


def names_by_file(names: ChoiceNames) -> dict[str, list[str]]:
    """The same for `OnnxFiles`."""
    files: dict[str, list[str]] = {}
    for places in names.values():
        for file, name in places:
            files.setdefault(file, []).append(name)
    return files


def choices_in(
    places: Sequence[tuple[str, str]], seen: Mapping[str, Sequence[Array]]
) -> list[torch.Tensor]:
    """The masks [T, E] of one layer in `seen` of `OnnxFiles`; two runs of one text are joined."""
    masks = []
    for _, name in places:
        arrays = seen[name]
        batch, count = len(arrays[-1]) if len(arrays) > 1 else 1, arrays[0].shape[-1]
        whole = np.concatenate([array.reshape(batch, -1, count) for array in arrays], axis=1)
        masks.append(torch.from_numpy(whole.reshape(-1, count) != 0))
    return masks
