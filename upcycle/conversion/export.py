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
from upcycle.ir.measured import Check, Distance, OnnxFacts
from upcycle.ir.rounding import ROUNDING
from upcycle.models.companions import copy_companions, copy_licences
from upcycle.models.moe_layers import moe_layers, with_own_experts
from upcycle.models.tokenizer import tokenizer_in
from upcycle.passes.plan.costs import model_size
from upcycle.recipe.onnx import ONNX_DEFAULTS, Onnx
from upcycle.targets.checkpoint import write_checkpoint
from upcycle.targets.files.staging import check_output, staged
from upcycle.targets.gguf.write import TYPE_OF, GgufType, write_gguf
from upcycle.targets.load import load
from upcycle.targets.onnx.write import in_float32, write_onnx
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.checks import EXPERTS, check, raise_if_any_failed
from upcycle.verification.files import verify_files
from upcycle.verification.gguf import verify_gguf, with_weights_of
from upcycle.verification.metrics import distance
from upcycle.verification.onnx.precision import verify_precision
from upcycle.verification.whole_model import compare_models

ExportTarget = Literal["onnx", "native", "gguf"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        form: ``onnx``, ``gguf`` with the type of its weights, or the native architecture.
        checks: the files against the model; empty if it was not verified.
        onnx: how far an ONNX file that is not float32 is from the model.
        rounded: how far the outputs are with the rounded weights of a GGUF file.
    """

    form: str
    checks: tuple[Check, ...]
    onnx: OnnxFacts | None = None
    rounded: Distance | None = None


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
    gguf_type: GgufType | None = None,
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
            of transformers, from one with code of ours; ``gguf``, a file for llama.cpp, from one in
            such an architecture, with its tokenizer.
        model: for a plain module: a dense instance, as `upcycle.load` takes it.
        example_inputs: inputs of the model, where they cannot be guessed.
        onnx: the section `onnx` of a recipe.
        architecture: for `native`, the architecture to write; by default what fits.
        runtimes: for `native`, what has to run it: transformers, vllm, llama.cpp, ...
        gguf_type: of the weights of `gguf`, as llama.cpp names it: f32, f16, bf16, q8_0; None is
            that of the model.
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
    given: dict[str, dict[str, str | None]] = {
        "native": {"architecture": architecture, "runtimes": ", ".join(runtimes) or None},
        "onnx": {"overrides": None if onnx == ONNX_DEFAULTS else "onnx"},
        "gguf": {"gguf_type": gguf_type},
    }
    for of, options in given.items():
        for name, value in options.items():
            if value is not None and of != target:
                raise UsageError(f"`{name}={value}`: it is for `target={of}`; leave it out")
    if gguf_type not in (None, *get_args(GgufType)):
        known = ", ".join(get_args(GgufType))
        raise UsageError(f"`gguf_type={gguf_type}`: choose from {known}")
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
        task = _Task(directory, folder, loaded, evaluation, trust_remote_code, verify, progress)
        if target == "onnx":
            done = _to_onnx(task, onnx)
        elif target == "native":
            done = _to_native(task, architecture, runtimes)
        else:
            done = _to_gguf(task, gguf_type)
        raise_if_any_failed(done.checks)
    return done


@dataclass(frozen=True)
class _Task:
    """What each target gets: the model of `source`, and the `folder` to write into."""

    source: Path
    folder: Path
    model: nn.Module
    evaluation: Evaluation
    trust_remote_code: bool
    verify: bool
    progress: Progress

    def copy_companions(self) -> None:
        copy_companions(self.source, self.folder, trust_remote_code=self.trust_remote_code)


def _to_onnx(task: _Task, options: Onnx) -> Exported:
    task.copy_companions()
    config = task.source / "config.json"
    if config.is_file():  # generation reads it
        shutil.copyfile(config, task.folder / config.name)
    single = in_float32(task.model)
    batch = task.evaluation.batches[0]
    before = outputs_of(single, batch) if task.verify else {}
    with with_own_experts(single):
        with step(task.progress, "exporting to ONNX"):
            write_onnx(task.folder, single, batch, {}, options)
        if not task.verify:
            return Exported("onnx", ())
        with step(task.progress, "running ONNX"):
            after = outputs_of(single, batch)
            found = max(distance(after[name], before[name]).relative for name in before)
            facts, checks = verify_precision(task.folder, single, task.evaluation, options)
    same = check(EXPERTS, found, ROUNDING[torch.float32])
    return Exported("onnx", (same, *checks), facts)


def _to_native(task: _Task, architecture: str | None, runtimes: Sequence[str]) -> Exported:
    task.copy_companions()
    view, plan = as_converted(task.model)
    plan = plan.requiring(runtimes, architecture)
    with step(task.progress, "writing"), eval_mode(view):
        written = write_checkpoint(task.folder, view, plan)
    if written.destination.target is None:
        reasons = [f"not as {name}: {why}" for name, why in written.destination.near.items()]
        kind: Any = getattr(view, "config", None)
        raise UnsupportedError(
            "; ".join(reasons)
            or f"no native architecture holds a model of type {getattr(kind, 'model_type', None)}"
        )
    if not task.verify:
        return Exported(written.architecture, ())
    with step(task.progress, "loading again"):
        report = header(plan, Facts(task.source.name, model_dtype(view), model_size(view)))
        report = verify_files(report, task.folder, plan, written, view, view, task.evaluation)
    return Exported(written.architecture, report.checks)


def _to_gguf(task: _Task, gguf_type: GgufType | None) -> Exported:
    copy_licences(task.source, task.folder)
    tokenizer = tokenizer_in(task.source, trust_remote_code=task.trust_remote_code)
    model, name = task.model, task.source.resolve().name
    if tokenizer is None:
        raise UnsupportedError(
            f"gguf: {name} has no tokenizer, and a file for llama.cpp contains one; copy the files "
            "of the tokenizer there"
        )
    kind: GgufType = gguf_type or TYPE_OF.get(model_dtype(model), "f32")
    path = task.folder / f"model-{kind}.gguf"
    with step(task.progress, "writing"):
        content = write_gguf(path, model, tokenizer, kind, name)
    if not task.verify:
        return Exported(f"gguf, {kind}", ())
    with step(task.progress, "reading again"):
        checks = verify_gguf(path, content)
        rounded = None
        if kind != TYPE_OF.get(model_dtype(model)):
            again = with_weights_of(path, model, content)
            with eval_mode(model, again):
                found = compare_models(model, again, task.evaluation, predictions=False)
            rounded = max(found.outputs.values(), key=lambda output: output.relative)
    return Exported(f"gguf, {kind}", checks, rounded=rounded)
