"""A converted module as files: writing them, and holding them against the module."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.evaluation import Evaluation
from upcycle.ir.report import Report
from upcycle.ir.spec import Plan
from upcycle.models.dense import Source
from upcycle.targets.card import card
from upcycle.targets.checkpoint import Checkpoint, planned_layers, write_checkpoint
from upcycle.targets.companions import copy_companions
from upcycle.targets.files.tensor_file import check_disk
from upcycle.targets.native.in_place import as_on_disk
from upcycle.targets.onnx.parts import ENCODER
from upcycle.targets.onnx.write import in_float32, write_onnx
from upcycle.util.eval_mode import eval_mode
from upcycle.util.progress import Progress, step
from upcycle.verification.files import verify_files
from upcycle.verification.onnx.precision import verify_precision


def write_module(
    directory: Path,
    model: nn.Module,
    plan: Plan,
    *,
    source: Source | None,
    example: ExampleInputs,
    targets: Sequence[str],
    max_shard_size: int,
    progress: Progress,
) -> Checkpoint:
    """Write the checkpoint, what the dense directory has beside its weights, and ONNX files.

    Args:
        directory: exists.
        model: the converted module.
        plan: how it was made.
        source: where the dense model comes from.
        example: inputs that the model accepts, for ONNX.
        targets: of ``safetensors``, ``onnx``.
        max_shard_size: bytes of one weight file.
        progress: called as each step begins and ends.

    Raises:
        ResourceError: the disk is too small; nothing was written.
        UnsupportedError: the model cannot be written as one of the targets.
    """
    check_disk(directory, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    if source and source.directory:  # first: what it has of its own is not written anew
        copy_companions(source.directory, directory)
    factory = source.name if source and source.directory is None else None
    with step(progress, "writing"), eval_mode(model):
        written = write_checkpoint(
            directory, model, plan, factory=factory, max_shard_size=max_shard_size
        )
    if "onnx" in targets:
        with (
            step(progress, "exporting to ONNX"),
            eval_mode(model),
            as_on_disk(planned_layers(model, plan), written.target),
        ):
            single = in_float32(model, rounded_routers=written.form == "native")
            write_onnx(directory, single, example, written.stored, plan.recipe.onnx)
    return written


def verify_written(
    report: Report,
    directory: Path,
    plan: Plan,
    written: Checkpoint,
    dense: nn.Module,
    model: nn.Module,
    evaluation: Evaluation,
    targets: Sequence[str],
    progress: Progress,
) -> Report:
    """Tiers T3 and T4: the files of `write_module` against the module; arguments as there."""
    with step(progress, "loading again"):
        report = verify_files(report, directory, plan, written, dense, model, evaluation)
    if "onnx" not in targets:
        return report
    with (
        step(progress, "running ONNX"),
        eval_mode(model),
        as_on_disk(planned_layers(model, plan), written.target),
    ):
        single = in_float32(model, rounded_routers=written.form == "native")
        facts, checks = verify_precision(directory, single, evaluation, plan.recipe.onnx)
    return replace(report, onnx=facts, checks=(*report.checks, *checks))


def module_card(
    name: str,
    directory: Path,
    report: Report,
    plan: Plan,
    written: Checkpoint,
    targets: Sequence[str],
) -> str:
    """README.md of a directory with the files of a module."""
    is_pair = (directory / ENCODER).is_file()
    return card(name, plan, written, targets, report, is_pair=is_pair)
