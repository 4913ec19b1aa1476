"""A program of `torch.export`, or those of a model that generates text."""

import torch

from upcycle.conversion.exports.task import Exported, Task
from upcycle.data.verification_inputs import outputs_of
from upcycle.ir.rounding import ROUNDING
from upcycle.models.moe_layers import with_own_experts
from upcycle.targets.pt2.write import write_programs
from upcycle.targets.traced.experts import Form
from upcycle.util.modules import model_dtype
from upcycle.util.progress import step
from upcycle.verification.checks import EXPERTS, check
from upcycle.verification.metrics import distance
from upcycle.verification.programs import verify_programs


def write(task: Task, form: Form) -> Exported:
    """Write the programs, load and run them, and compare."""
    task.copy_companions()
    model, batch = task.model, task.evaluation.batches[0]
    with torch.no_grad():
        before = outputs_of(model, batch) if task.verify else {}
    with with_own_experts(model):
        with step(task.progress, "exporting programs"):
            write_programs(task.folder, model, batch, form)
        if not task.verify:
            return Exported(f"pt2, {form}", ())
        with step(task.progress, "running programs"):
            after = outputs_of(model, batch)
            checks = verify_programs(task.folder, model, task.evaluation, form, cache=True)
    found = max(distance(after[name], before[name]).relative for name in before)
    same = check(EXPERTS, found, ROUNDING[model_dtype(model)])
    return Exported(f"pt2, {form}", (same, *checks))
