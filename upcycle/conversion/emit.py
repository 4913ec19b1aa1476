"""Emit: write a converted model in the asked formats, and check the files as a user would use them.

The directory holds the checkpoint, the ONNX file (whose weights are in the checkpoint), what the
dense directory had beside its weights, ``recipe.yaml``, ``report.json``, ``provenance.json`` and a
model card.
"""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.data.evaluation import Evaluation, outputs_of
from upcycle.errors import UsageError
from upcycle.ir.spec import Plan
from upcycle.ir.weights import Provenance
from upcycle.models.dense import Source
from upcycle.recipe.reader import dump_recipe
from upcycle.targets.card import card
from upcycle.targets.checkpoint import Checkpoint, planned_layers, write_checkpoint
from upcycle.targets.companions import copy_companions
from upcycle.targets.files.tensor_file import check_disk
from upcycle.targets.load import load
from upcycle.targets.native.choose import NativeTarget
from upcycle.targets.native.fold_router import MOST_ELSEWHERE, MOST_WEIGHT_ERROR
from upcycle.targets.native.in_place import as_on_disk
from upcycle.targets.native.tempered import every_expert, is_tempered, tempered
from upcycle.targets.onnx.parts import ENCODER
from upcycle.targets.provenance_file import write_origins
from upcycle.util.eval_mode import eval_mode
from upcycle.util.json_text import json_text
from upcycle.util.module_facts import model_dtype
from upcycle.util.progress import Progress, step
from upcycle.verification.checks import Check, check
from upcycle.verification.metrics import ROUNDING
from upcycle.verification.near_ties import NearTies, choices_of, following
from upcycle.verification.onnx.files import ONNX_CHECK, ONNX_TIES, in_float32, write_onnx
from upcycle.verification.onnx.precision import verify_precision
from upcycle.verification.whole_model import compare_models, raise_if_failed, same_greedy_text

TARGETS = ("safetensors", "onnx")
RELOADED, GREEDY = "files loaded again", "greedy text differs from the dense model's"
TEMPERED = "weights of a tempered router"
ELSEWHERE = "tokens at other experts, by a tempered router"
TIES = "near ties of experts, files loaded again"
FILE_CHECKS = (RELOADED, TIES, GREEDY, TEMPERED, ELSEWHERE, ONNX_CHECK, ONNX_TIES)  # T3 and T4


@dataclass(frozen=True)
class Emission:
    """What was written: the checkpoint, and the names of all files."""

    checkpoint: Checkpoint
    files: tuple[str, ...]


def check_targets(targets: Sequence[str], *, verify: bool = False) -> None:
    """Raises UsageError for an unknown target, or one that cannot be verified on this machine."""
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--target {target}: unknown; choose from {', '.join(TARGETS)}")
    if verify and "onnx" in targets and importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(
            "--target onnx is verified with ONNX Runtime, which is not installed: pip install "
            "'upcycle[cpu]' (or 'upcycle[gpu]', not both), or pass --no-verify"
        )


def emit(
    directory: Path,
    model: nn.Module,
    plan: Plan,
    *,
    dense: nn.Module,
    provenance: Mapping[str, Provenance],
    evaluation: Evaluation,
    source: Source | None,
    targets: Sequence[str],
    max_shard_size: int,
    report: dict[str, Any],
    verify: bool,
    progress: Progress,
    name: str,
) -> Emission:
    """Write everything into `directory`, which exists; fills in `report`.

    Raises:
        ResourceError: the disk is too small; nothing was written.
        UnsupportedError: the model cannot be written as one of the targets.
        VerificationError: what is read back is not the model (tiers T3 and T4).
    """
    check_disk(directory, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    with eval_mode(model, dense):
        if source and source.directory:  # first: what it has of its own is not written anew
            copy_companions(source.directory, directory)
        factory = source.name if source and source.directory is None else None
        with step(progress, "writing"):
            written = write_checkpoint(
                directory, model, plan, factory=factory, max_shard_size=max_shard_size
            )
        report["checkpoint"] = written.to_json()
        if verify:
            allowed = ROUNDING[model_dtype(model)]
            if written.form == "native":  # whose routers compute in float32, in transformers
                allowed = max(allowed, ROUNDING[torch.float32])
            with step(progress, "loading again"):
                target = written.target
                if target is not None and is_tempered(target, plan.specs):
                    found = _verify_tempered(directory, model, evaluation, plan, target, allowed)
                    checks, report["tempered"] = found
                else:
                    checks = _verify_reload(directory, model, dense, evaluation, plan, allowed)
            report["checks"] += checks
        if "onnx" in targets:
            with as_on_disk(planned_layers(model, plan), written.target):
                single = in_float32(model, rounded_routers=written.form == "native")
                with step(progress, "exporting to ONNX"):
                    options = plan.recipe.onnx
                    paths = write_onnx(directory, single, evaluation, written, options)
                if verify:
                    with step(progress, "running ONNX"):
                        facts, checks = verify_precision(
                            directory, paths, single, evaluation, options
                        )
                    report["checks"] += checks
                    if facts:
                        report["onnx"] = facts
    raise_if_failed(report)
    (directory / "recipe.yaml").write_text(dump_recipe(plan.recipe), encoding="utf-8")
    (directory / "report.json").write_text(json_text(report), encoding="utf-8")
    write_origins(directory, plan, provenance)
    text = card(name, plan, written, targets, report, is_pair=(directory / ENCODER).is_file())
    (directory / "README.md").write_text(text, encoding="utf-8")
    return Emission(written, tuple(sorted(p.name for p in directory.iterdir())))


def _verify_reload(
    directory: Path,
    model: nn.Module,
    dense: nn.Module,
    evaluation: Evaluation,
    plan: Plan,
    allowed: float,
) -> list[Check]:
    """Tier T3: the files give the model back, and an exact one writes the dense model's text.

    If they do not, the model follows their choices, as `upcycle.verification.near_ties` describes;
    in a half type it may then be twice as far from them as from itself in float32.
    """
    skeleton = None if isinstance(model, PreTrainedModel) else copy.deepcopy(dense)
    loaded = load(directory, model=skeleton)
    found = compare_models(model, loaded, evaluation, predictions=False)["relative"]
    checks = [check(RELOADED, found, allowed)]
    if found > allowed and (followed := _followed(model, loaded, evaluation, plan)):
        (found, ties), most, near = followed, allowed, allowed
        if model_dtype(model).itemsize == 2:
            noise = _followed(copy.deepcopy(model).float(), model, evaluation, plan)
            assert noise is not None
            off = (noise[0], noise[1].apart)
            most, near = (min(max(allowed, 2 * error), 1.0) for error in off)
        checks = [check(RELOADED, found, most), ties.check(TIES, near)]
    if plan.promise == "exact" and allowed <= ROUNDING[torch.float32]:
        same = same_greedy_text(dense, loaded, evaluation)
        if same is not None:
            checks.append(check(GREEDY, float(not same), 0))
    return checks


def _followed(
    model: nn.Module, other: nn.Module, evaluation: Evaluation, plan: Plan
) -> tuple[float, NearTies] | None:
    """The distance of `model`, which follows the choices of `other`, and what that shows of them.

    None if the choices of `other` cannot be seen.
    """
    with choices_of(other, [layer for _, layer in planned_layers(model, plan)]) as choices:
        if choices is None:
            return None
        with following(choices) as ties:
            found = compare_models(model, other, evaluation, predictions=False)
    return found["relative"], ties


def _verify_tempered(
    directory: Path,
    model: nn.Module,
    evaluation: Evaluation,
    plan: Plan,
    target: NativeTarget,
    allowed: float,
) -> tuple[list[Check], dict[str, Any]]:
    """Tier T3 for files with tempered routers, which are almost those of the model.

    They are compared with the model as it is with such routers, all experts visited, so that no
    near tie is decided in two ways; and what tempering changes is measured by itself: in each
    layer, and (second result, on which nothing is bounded) in what the files compute.
    """
    loaded, layers = load(directory), list(planned_layers(model, plan))
    whole = compare_models(model, loaded, evaluation, predictions=False)["outputs"]
    with tempered(layers, target) as seen:
        for batch in evaluation.batches:
            outputs_of(model, batch)
    count = plan.specs[0].num_experts
    with tempered(layers, target, every=True), every_expert(loaded, count):
        found = compare_models(model, loaded, evaluation, predictions=False)
    checks = [
        check(RELOADED, found["relative"], allowed),
        check(TEMPERED, seen.weight_error, MOST_WEIGHT_ERROR),
        check(ELSEWHERE, seen.elsewhere_share, MOST_ELSEWHERE),
    ]
    return checks, {"tokens": seen.tokens, "elsewhere": seen.elsewhere, "outputs": whole}
