"""Write a mixture of experts that is there already, trained or not, in another format."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.dense_model import Facts, header
from upcycle.conversion.trained import as_converted
from upcycle.data.verification_inputs import Evaluation, evaluation_for, outputs_of
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.measured import Check, OnnxFacts
from upcycle.ir.rounding import ROUNDING
from upcycle.models.companions import copy_companions
from upcycle.models.moe_layers import moe_layers, with_own_experts
from upcycle.passes.plan.costs import model_size
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.targets.checkpoint import write_checkpoint
from upcycle.targets.files.staging import check_output, staged
from upcycle.targets.load import load
from upcycle.targets.onnx.write import in_float32, write_onnx
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.checks import EXPERTS, check, raise_if_any_failed
from upcycle.verification.files import verify_files
from upcycle.verification.metrics import distance
from upcycle.verification.onnx.precision import verify_precision

ExportTarget = Literal["onnx", "native"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        form: ``onnx``, or the native architecture.
        checks: the files against the model; empty if it was not verified.
        onnx: how far a file that is not float32 is from the model.
    """

    form: str
    checks: tuple[Check, ...]
    onnx: OnnxFacts | None = None


def export(
    directory: str | Path,
    out: str | Path,
    *,
    target: ExportTarget = "onnx",
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    onnx: Onnx = ONNX_DEFAULTS,
    architecture: str | None = None,
    runtimes: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Exported:
    """Write an MoE model in another format, and compare what was written with it.

    The weights are taken as they are: trained, merged, pruned, or made by another program.

    Args:
        directory: what ``upcycle convert`` or ``save_pretrained`` wrote, of a converted model or of
            an MoE architecture of transformers.
        out: the new directory, beside whose place it is written first.
        target: ``onnx``, a file for ONNX Runtime; ``native``, a checkpoint in an MoE architecture
            of transformers, from one with code of ours.
        model: for a plain module: a dense instance, as `upcycle.load` takes it.
        example_inputs: inputs of the model, where they cannot be guessed.
        onnx: the section `onnx` of a recipe.
        architecture: for `native`, the architecture to write; by default what fits.
        runtimes: for `native`, what has to run it: transformers, vllm, llama.cpp, ...
        overwrite: replace `out` if it exists.
        trust_remote_code: run Python code of the directory.
        verify: load or run what was written, and compare.
        progress: called as each stage begins and ends.

    Raises:
        UsageError: there is no such model, or it is dense.
        UnsupportedError: the target cannot hold it; the reason is that of the trained weights, so
            what holds for copies alone does not count.
        VerificationError: what was written is not the model.
    """
    directory, out = Path(directory), Path(out)
    if target not in get_args(ExportTarget):
        raise UsageError(f"`target={target}`: choose from {', '.join(get_args(ExportTarget))}")
    check_output(out, overwrite=overwrite, protect=[directory])
    with step(progress, "loading"):
        loaded = load(directory, model, trust_remote_code=trust_remote_code)
    if not moe_layers(loaded):
        raise UsageError(
            f"{directory}: no layer of it is a mixture of experts that is known here; convert a "
            "dense model with `upcycle convert`"
        )
    evaluation = evaluation_for(
        loaded,
        directory=directory,
        trust_remote_code=trust_remote_code,
        example=example_inputs,
    )
    with staged(out, overwrite=overwrite, protect=[directory]) as folder:
        copy_companions(directory, folder, trust_remote_code=trust_remote_code)
        if target == "onnx":
            done = _to_onnx(folder, loaded, evaluation, onnx, verify, progress)
            if (directory / "config.json").is_file():  # generation reads it
                shutil.copyfile(directory / "config.json", folder / "config.json")
        else:
            done = _to_native(folder, loaded, evaluation, architecture, runtimes, verify, progress)
        raise_if_any_failed(done.checks)
    return done


def _to_onnx(
    folder: Path,
    model: nn.Module,
    evaluation: Evaluation,
    options: Onnx,
    verify: bool,
    progress: Progress,
) -> Exported:
    single = in_float32(model)
    batch = evaluation.batches[0]
    before = outputs_of(single, batch) if verify else {}
    with with_own_experts(single):
        with step(progress, "exporting to ONNX"):
            write_onnx(folder, single, batch, {}, options)
        if not verify:
            return Exported("onnx", ())
        with step(progress, "running ONNX"):
            after = outputs_of(single, batch)
            found = max(distance(after[name], before[name]).relative for name in before)
            facts, checks = verify_precision(folder, single, evaluation, options)
    same = check(EXPERTS, found, ROUNDING[torch.float32])
    return Exported("onnx", (same, *checks), facts)


def _to_native(
    folder: Path,
    model: nn.Module,
    evaluation: Evaluation,
    architecture: str | None,
    runtimes: Sequence[str],
    verify: bool,
    progress: Progress,
) -> Exported:
    view, plan = as_converted(model)
    plan = plan.requiring(runtimes, architecture)
    with step(progress, "writing"), eval_mode(view):
        written = write_checkpoint(folder, view, plan)
    if written.destination.target is None:
        reasons = [f"not as {name}: {why}" for name, why in written.destination.near.items()]
        kind: Any = getattr(view, "config", None)
        raise UnsupportedError(
            "; ".join(reasons)
            or f"no native architecture holds a model of type {getattr(kind, 'model_type', None)}"
        )
    if not verify:
        return Exported(written.architecture, ())
    with step(progress, "loading again"):
        report = header(plan, Facts(folder.name, model_dtype(view), model_size(view)))
        report = verify_files(report, folder, plan, written, view, view, evaluation)
    return Exported(written.architecture, report.checks)
