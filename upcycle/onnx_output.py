"""Write the ONNX file of a converted model, and run it against the model (tier T4)."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.capture import ExampleInputs
from upcycle.checks import Check, check
from upcycle.errors import UnsupportedError, VerificationError
from upcycle.evaluation import Evaluation, comparable, device_of, outputs_of
from upcycle.metrics import ROUNDING, distance
from upcycle.moe import MoE
from upcycle.targets.checkpoint import Checkpoint
from upcycle.targets.onnx.export import export_onnx
from upcycle.targets.onnx.running import session
from upcycle.verification import model_dtype

ONNX_CHECK = "ONNX Runtime against PyTorch"


def write_onnx(
    directory: Path, model: nn.Module, evaluation: Evaluation, written: Checkpoint
) -> Path:
    """Write ``model.onnx``, which computes in float32 and reads the weights of the checkpoint.

    Args:
        directory: of the checkpoint.
        model: as `in_float32` returns it.
        evaluation: its first batch is the example.
        written: the checkpoint.

    Raises:
        UnsupportedError: torch cannot export the model.
    """
    try:
        with _without_cache(model):
            return export_onnx(
                model,
                _tensors(evaluation.batches[0]),
                path=directory / "model.onnx",
                stored=written.stored,
            )
    except UnsupportedError as error:
        raise UnsupportedError(
            f"--target onnx: {error}; --target safetensors alone writes the checkpoint"
        ) from error


def verify_onnx(path: Path, model: nn.Module, evaluation: Evaluation) -> list[Check]:
    """Tier T4: ONNX Runtime against `model`, which is in float32, on the evaluation's batches.

    Raises:
        VerificationError: ONNX Runtime cannot run the file, or it has other outputs than the model.
    """
    runner = session(path)
    names = [value.name for value in runner.get_outputs()]
    worst = 0.0
    with _without_cache(model):
        for batch in evaluation.batches:
            given = _tensors(batch)
            values = list(given.values()) if isinstance(given, Mapping) else list(given)
            inputs = [value.name for value in runner.get_inputs()]
            if len(inputs) != len(values):
                raise VerificationError(
                    f"{path.name} has {len(inputs)} inputs and the model {len(values)}"
                )
            feeds = {name: t.numpy() for name, t in zip(inputs, values, strict=True)}
            try:
                made = runner.run(None, feeds)
            except Exception as error:  # onnxruntime's own types, which say what and where
                reason = " ".join(str(error).split())[:300]
                raise VerificationError(
                    f"ONNX Runtime cannot run {path.name}: {reason}; --target safetensors alone "
                    "writes the checkpoint"
                ) from error
            arrays = {name: torch.from_numpy(a) for name, a in zip(names, made, strict=True)}
            worst = max(worst, _distance(comparable(arrays, given), outputs_of(model, given), path))
    return [check(ONNX_CHECK, worst, ROUNDING[torch.float32])]


def _distance(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], path: Path
) -> float:
    for name, reference in theirs.items():
        if name not in ours or ours[name].shape != reference.shape:
            raise VerificationError(f"{path.name} does not return {name} {list(reference.shape)}")
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


def _tensors(example: ExampleInputs) -> Any:
    """The tensors among the inputs, floats in float32: an ONNX graph has no other kind."""

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
