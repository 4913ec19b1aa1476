"""A checkpoint in an MoE architecture of transformers."""

from collections.abc import Sequence
from typing import Any

from upcycle.conversion.dense_model import Facts, header
from upcycle.conversion.exports.task import Exported, Task
from upcycle.conversion.trained import as_converted
from upcycle.errors import UnsupportedError
from upcycle.passes.plan.costs import model_size
from upcycle.targets.checkpoint import write_checkpoint
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.util.progress import step
from upcycle.verification.files import verify_files


def write(task: Task, architecture: str | None, runtimes: Sequence[str]) -> Exported:
    """Write the checkpoint, load it and compare."""
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
