"""Write the ONNX files of a converted model, and run them against the model (tier T4)."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.capture.capture import ExampleInputs
from upcycle.data.evaluation import Evaluation, comparable
from upcycle.errors import UnsupportedError, VerificationError
from upcycle.layers.moe import MoE
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.onnx.cache import PAST
from upcycle.targets.onnx.decode import OnnxFiles
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.opaque_experts import named_tensors
from upcycle.targets.onnx.parts import Part, parts
from upcycle.util.eval_mode import eval_mode
from upcycle.util.module_facts import device_of, model_dtype
from upcycle.verification.checks import Check, check
from upcycle.verification.metrics import ROUNDING, distance
from upcycle.verification.near_ties import Choices, following
from upcycle.verification.onnx.choices import ChoiceNames, choices_in, inner_choices, names_by_file

ONNX_CHECK = "ONNX Runtime against PyTorch"
ONNX_TIES = "near ties of experts, ONNX Runtime against PyTorch"
_T = TypeVar("_T")


def write_onnx(
    directory: Path,
    model: nn.Module,
    evaluation: Evaluation,
    written: Checkpoint,
    options: Onnx = ONNX_DEFAULTS,
) -> list[Path]:
    """Write the ONNX files, which read the weights of the checkpoint where they are the same.

    A model that generates text gets files with a cache; see `upcycle.targets.onnx.parts`.

    Args:
        directory: of the checkpoint.
        model: as `in_float32` returns it.
        evaluation: its first batch is the example.
        written: the checkpoint.
        options: of the recipe.

    Returns:
        The files.

    Raises:
        UnsupportedError: torch cannot export the model.
    """
    example = _tensors(model, evaluation.batches[0])
    try:
        with _without_cache(model), eval_mode(model):
            return [
                export_onnx(
                    model,
                    part.example,
                    path=directory / part.file,
                    stored=written.stored,
                    dynamic=part.axes,
                    compute=part.compute,
                    options=options.model_copy(update={"tokens": _tokens(options, part)}),
                )
                for part in parts(model, example, cache=options.cache)
            ]
    except UnsupportedError as error:
        raise UnsupportedError(
            f"--target onnx: {error}; --target safetensors alone writes the checkpoint"
        ) from error


def _tokens(options: Onnx, part: Part) -> int | tuple[int, int] | None:
    """Of typical calls: with a cache a text is read, and another written token by token."""
    names = part.example if isinstance(part.example, Mapping) else ()
    has_cache = any(name.startswith(f"{PAST}.") for name in names)
    return options.tokens or ((1, 256) if has_cache else None)


def verify_onnx(directory: Path, model: nn.Module, evaluation: Evaluation) -> list[Check]:
    """Tier T4 for files in float32: `onnx_distance` against rounding.

    If it is more, `model` follows the choices of the files, as `upcycle.verification.near_ties`
    describes.
    """
    allowed = ROUNDING[torch.float32]
    found, ties = onnx_distance(directory, model, evaluation), None
    names = inner_choices(directory, model) if found > allowed else {}
    if names:
        choices: dict[MoE, list[torch.Tensor]] = {layer: [] for layer in names}
        with following(choices) as ties:
            found = onnx_distance(directory, model, evaluation, names, choices)
    checks = [check(ONNX_CHECK, found, allowed)]
    return checks if ties is None else [*checks, ties.check(ONNX_TIES, allowed)]


def onnx_distance(
    directory: Path,
    model: nn.Module,
    evaluation: Evaluation,
    names: ChoiceNames | None = None,
    choices: Choices | None = None,
) -> float:
    """ONNX Runtime against `model`, which is in float32, on the evaluation's batches; the worst.

    With a cache all tokens but the last are read first, and the last one then. With `names` what
    the files choose is put into `choices` before the model runs.

    Raises:
        VerificationError: ONNX Runtime cannot run a file, or it has other outputs than the model.
    """
    worst = 0.0
    names = names or {}
    files = _ran(lambda where: OnnxFiles(where, names_by_file(names)), directory)
    with _without_cache(model), eval_mode(model):
        for batch in evaluation.batches:
            given = _tensors(model, batch)
            arrays = _ran(files.outputs, given)
            for layer, masks in (choices or {}).items():
                masks += choices_in(names[layer], files.seen)
            made = {name: torch.from_numpy(array) for name, array in arrays.items()}
            reference = _outputs_of(model, files.completed(given))
            if files.has_cache:
                reference = {name: reference[name] for name in made}
            ours, theirs = comparable(made, given), comparable(reference, given)
            worst = max(worst, _distance(ours, theirs, directory))
    return worst


def _ran(function: Callable[[Any], _T], argument: Any) -> _T:
    """What `function` returns; a refusal of ONNX Runtime is a failed verification."""
    try:
        return function(argument)
    except UnsupportedError as error:
        raise VerificationError(
            f"{error}; --target safetensors alone writes the checkpoint"
        ) from error


def _outputs_of(model: nn.Module, given: Any) -> dict[str, torch.Tensor]:
    """The float tensors that `model` returns, named as in the file."""
    with torch.no_grad():
        out = model(**given) if isinstance(given, Mapping) else model(*given)
    named = named_tensors(out)
    return {n: t for n, t in named.items() if t.is_floating_point() and t.numel()}


def _distance(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], directory: Path
) -> float:
    for name, reference in theirs.items():
        if name not in ours or ours[name].shape != reference.shape:
            raise VerificationError(
                f"the ONNX file in {directory} does not return {name} {list(reference.shape)}"
            )
    return max(distance(ours[name], reference).relative for name, reference in theirs.items())


def in_float32(model: nn.Module, *, rounded_routers: bool = False) -> nn.Module:
    """The model in the type and on the device that ONNX Runtime has everywhere; a copy if needed.

    Args:
        model: any converted model.
        rounded_routers: the checkpoint holds the routers in the dtype of the other weights.

    Raises:
        UnsupportedError: its weights are float64.
    """
    dtype = model_dtype(model)
    if dtype == torch.float32 and device_of(model).type == "cpu":
        return model
    if dtype == torch.float64:
        raise UnsupportedError("--target onnx computes in float32; convert with --dtype float32")
    model = copy.deepcopy(model)
    if rounded_routers:
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.to(dtype)
    return model.to(device="cpu", dtype=torch.float32)


def _tensors(model: nn.Module, example: ExampleInputs) -> Any:
    """The tensors among the inputs, floats in float32: an ONNX graph has no other kind.

    A model of transformers gets them by name.
    """
    if isinstance(model, PreTrainedModel) and not isinstance(example, Mapping):
        example = inspect.signature(model.forward).bind(*example).arguments

    def single(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    if isinstance(example, Mapping):
        return {k: single(v) for k, v in example.items() if isinstance(v, torch.Tensor)}
    return tuple(single(v) for v in example)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A graph from token ids to outputs, without the key-value cache of generation."""
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache is not None:
            config.use_cache = False
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
