"""An ONNX file of a mixture of experts."""

import shutil

import torch

from upcycle.conversion.exports.task import Exported, Task
from upcycle.data.verification_inputs import outputs_of
from upcycle.ir.rounding import ROUNDING
from upcycle.models.moe_layers import with_own_experts
from upcycle.recipe.onnx import Onnx
from upcycle.targets.onnx.write import in_float32, write_onnx
from upcycle.util.progress import step
from upcycle.verification.checks import EXPERTS, check
from upcycle.verification.metrics import distance
from upcycle.verification.onnx.precision import verify_precision


def write(task: Task, options: Onnx) -> Exported:
    """Write the file, run it and compare."""
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
