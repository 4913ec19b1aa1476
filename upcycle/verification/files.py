"""Tier T3 of verification: written files, loaded as a user would load them, against the model."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from upcycle.data.verification_inputs import Evaluation, outputs_of
from upcycle.errors import VerificationError
from upcycle.ir.measured import Check, Tempered
from upcycle.ir.report import Report
from upcycle.ir.rounding import ROUNDING
from upcycle.ir.spec import Plan
from upcycle.layers.tap import has_hooks
from upcycle.targets.checkpoint import Checkpoint, planned_layers
from upcycle.targets.load import load
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.fold_router import MOST_ELSEWHERE, MOST_WEIGHT_ERROR
from upcycle.targets.native.tempered import every_expert, is_tempered, tempered
from upcycle.util.copies import copy_of
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.verification.checks import ELSEWHERE, GREEDY, RELOADED, TEMPERED, TIES, check
from upcycle.verification.near_ties import NearTies, choices_of, following
from upcycle.verification.whole_model import compare_models, same_greedy_text

# In which type a model is compared with itself, and how far off that can excuse: a wrong expert is
# off by 1e-2 and more, which sums of half types can be, too.
_WIDER = {
    torch.float16: (torch.float32, 1.0),
    torch.bfloat16: (torch.float32, 1.0),
    torch.float32: (torch.float64, 1e-3),
}


def verify_files(
    report: Report,
    directory: Path,
    plan: Plan,
    written: Checkpoint,
    dense: nn.Module,
    model: nn.Module,
    evaluation: Evaluation,
) -> Report:
    """Load `directory`, `written` from `model`, and compare; the report with the new checks."""
    allowed = ROUNDING[model_dtype(model)]
    if written.destination.form == "native":  # transformers computes the router in float32
        allowed = max(allowed, ROUNDING[torch.float32])
    target, change = written.destination.target, report.tempered
    with eval_mode(dense, model):
        if target is not None and is_tempered(target, plan.specs):
            checks, change = _tempered(directory, model, evaluation, plan, target, allowed)
        else:
            checks = _reloaded(directory, model, dense, evaluation, plan, allowed)
    return replace(report, checks=(*report.checks, *checks), tempered=change)


def _reloaded(
    directory: Path,
    model: nn.Module,
    dense: nn.Module,
    evaluation: Evaluation,
    plan: Plan,
    allowed: float,
) -> list[Check]:
    """The files give the model back, and if exact generate the text of the dense model.

    Else the model follows their choices, as `upcycle.verification.near_ties` describes; if it
    magnifies rounding, it may then be twice as far from them as from itself in a wider type.
    """
    skeleton = None if isinstance(model, PreTrainedModel) else copy_of(dense)
    loaded = load(directory, model=skeleton, trust_remote_code=True)
    found = compare_models(model, loaded, evaluation, predictions=False).relative
    hooked = next((path for path, module in dense.named_modules() if has_hooks(module)), None)
    if found > allowed and skeleton is None and hooked is not None:
        raise VerificationError(
            f"loaded again, the files are {found:.3g} off (allowed {allowed:.3g}): no file holds "
            f"the hooks on `{hooked}`; remove them before saving"
        )
    checks = [check(RELOADED, found, allowed)]
    if found > allowed and (followed := _followed(model, loaded, evaluation, plan)):
        (found, ties), most, near = followed, allowed, allowed
        wider, cap = _WIDER.get(model_dtype(model), (None, allowed))
        if wider is not None and max(found, ties.apart) > allowed and _reads_no_floats(evaluation):
            noise = _followed(copy_of(model).to(wider), model, evaluation, plan)
            assert noise is not None
            off = (noise[0], noise[1].apart)
            most, near = (min(max(allowed, 2 * error), cap) for error in off)
        checks = [check(RELOADED, found, most), ties.check(TIES, near)]
    if plan.promise == "exact" and allowed <= ROUNDING[torch.float32]:
        same = same_greedy_text(dense, loaded, evaluation)
        if same is not None:
            checks.append(check(GREEDY, float(not same), 0))
    return checks


def _reads_no_floats(evaluation: Evaluation) -> bool:
    """Whether a model in another type reads the same inputs."""
    leaves = pytree.tree_leaves(evaluation.batches)
    return not any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in leaves)


def _followed(
    model: nn.Module, other: nn.Module, evaluation: Evaluation, plan: Plan
) -> tuple[float, NearTies] | None:
    """The distance of `model` when it follows the choices of `other`; None if these are hidden."""
    with choices_of(other, [layer for _, layer in planned_layers(model, plan)]) as choices:
        if choices is None:
            return None
        with following(choices) as ties:
            found = compare_models(model, other, evaluation, predictions=False)
    return found.relative, ties


def _tempered(
    directory: Path,
    model: nn.Module,
    evaluation: Evaluation,
    plan: Plan,
    target: NativeTarget,
    allowed: float,
) -> tuple[list[Check], Tempered]:
    """Checks of files with tempered routers, which are almost those of the model.

    They are compared with the model with such routers, all experts visited, so that there are no
    near ties. What tempering changes is measured by itself: in each layer, and (second result,
    without a bound) in the outputs of the files.
    """
    loaded, layers = load(directory, trust_remote_code=True), list(planned_layers(model, plan))
    whole = compare_models(model, loaded, evaluation, predictions=False).outputs
    with tempered(layers, target) as seen:
        for batch in evaluation.batches:
            outputs_of(model, batch)
    count = plan.specs[0].num_experts
    with tempered(layers, target, every=True), every_expert(loaded, count):
        found = compare_models(model, loaded, evaluation, predictions=False)
    checks = [
        check(RELOADED, found.relative, allowed),
        check(TEMPERED, seen.weight_error, MOST_WEIGHT_ERROR),
        check(ELSEWHERE, seen.elsewhere / max(seen.tokens, 1), MOST_ELSEWHERE),
    ]
    return checks, Tempered(seen.tokens, seen.elsewhere, whole)
