"""Tier T4 of verification: ONNX files, run, against the model in torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from torch import nn

from upcycle.data.text import is_language_model
from upcycle.data.verification_inputs import Evaluation, comparable
from upcycle.errors import UnsupportedError, VerificationError
from upcycle.ir.measured import Check, Distance, ModelDistance
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.moe import MoE
from upcycle.onnx.inputs import Array
from upcycle.targets.onnx.decode import OnnxFiles
from upcycle.targets.onnx.file_names import FILES
from upcycle.targets.onnx.write import in_graph
from upcycle.targets.traced.arguments import Arguments, apart
from upcycle.targets.traced.cache import without_cache
from upcycle.targets.traced.outputs import named_tensors
from upcycle.util.modules import eval_mode
from upcycle.verification.checks import ONNX, ONNX_TIES, check
from upcycle.verification.metrics import check_outputs, compare_predictions
from upcycle.verification.near_ties import Choices, following
from upcycle.verification.whole_model import next_tokens, output_distance

_T = TypeVar("_T")
# For each layer the file, and the name of the weights [T, E] there, each time that it runs.
ChoiceNames = Mapping[MoE, Sequence[tuple[str, str]]]


def verify_onnx(directory: Path, model: nn.Module, evaluation: Evaluation) -> list[Check]:
    """Tier T4 for files in float32: `onnx_distance` against rounding.

    If it is more, `model` follows the choices of the files, as `upcycle.verification.near_ties`
    describes.
    """
    allowed = ROUNDING[torch.float32]
    found, ties = onnx_distance(directory, model, evaluation), None
    names = _inner_choices(directory, model) if found > allowed else {}
    if names:
        choices: dict[MoE, list[torch.Tensor]] = {layer: [] for layer in names}
        with following(choices) as ties:
            found = onnx_distance(directory, model, evaluation, names, choices)
    checks = [check(ONNX, found, allowed)]
    return checks if ties is None else [*checks, ties.check(ONNX_TIES, allowed)]


def onnx_distance(
    directory: Path,
    model: nn.Module,
    evaluation: Evaluation,
    names: ChoiceNames | None = None,
    choices: Choices | None = None,
) -> float:
    """The largest relative error of `compare_onnx`."""
    return compare_onnx(directory, model, evaluation, names, choices).relative


def compare_onnx(
    directory: Path,
    model: nn.Module,
    evaluation: Evaluation,
    names: ChoiceNames | None = None,
    choices: Choices | None = None,
    *,
    as_served: bool = False,
) -> ModelDistance:
    """ONNX Runtime against `model`, which is in float32, on the evaluation's batches.

    With a cache the last token is read after all others. With `names` the choices of the files are
    put into `choices` before the model runs. With `as_served` the kernels are those of a session
    without options, which round tokens where weights are rounded, and the predictions of a language
    model are compared, too.

    Raises:
        VerificationError: ONNX Runtime cannot run a file, or it has other outputs than the model.
    """
    names = names or {}
    found: dict[str, Distance] = {}
    inner: dict[str, list[str]] = {}
    for file, name in chain.from_iterable(names.values()):
        inner.setdefault(file, []).append(name)
    files = _ran(lambda where: OnnxFiles(where, inner, as_served=as_served), directory)
    language = None
    with without_cache(model), eval_mode(model):
        for batch in evaluation.batches:
            given = in_graph(model, batch)
            arrays = _ran(files.outputs, given.tensors)
            for layer, masks in (choices or {}).items():
                masks += _choices_in(names[layer], files.seen)
            made = {name: torch.from_numpy(array) for name, array in arrays.items()}
            reference = _outputs_of(model, given, files.completed(given.tensors))
            if files.has_cache:
                reference = {name: reference[name] for name in made}
            ours, theirs = (comparable(found, given.tensors) for found in (made, reference))
            check_outputs(ours, theirs, f"the ONNX file in {directory}")
            for name, tensor in theirs.items():
                gap = output_distance(name, ours[name], tensor)
                if name not in found or gap.relative > found[name].relative:
                    found[name] = gap
        if as_served and evaluation.windows is not None and is_language_model(model):
            language = compare_predictions(
                (next_tokens(model, ids), torch.from_numpy(_logits(files, ids)), ids)
                for ids in torch.split(evaluation.windows, 1)
            )
    worst = max((gap.relative for gap in found.values()), default=0.0)
    return ModelDistance(evaluation.what, found, worst, language)


def _logits(files: OnnxFiles, ids_BS: torch.Tensor) -> Array:
    return _ran(files.outputs, {"input_ids": ids_BS})["logits"]


def _ran(function: Callable[[Any], _T], argument: Any) -> _T:
    """What `function` returns; a refusal of ONNX Runtime is a failed verification."""
    try:
        return function(argument)
    except UnsupportedError as error:
        raise VerificationError(
            f"{error}; `targets=safetensors` alone writes the checkpoint"
        ) from error


def _outputs_of(
    model: nn.Module, given: Arguments, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The float tensors that `model` returns for `tensors`, named as in the file."""
    with torch.no_grad():
        named = named_tensors(given.call(model, tensors))
    names = apart(named, given.tensors)
    pairs = zip(names, named.values(), strict=True)
    return {n: t for n, t in pairs if t.is_floating_point() and t.numel()}


def _inner_choices(directory: Path, model: nn.Module) -> ChoiceNames:
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


def _choices_in(
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
