"""The report of a conversion in memory: what was done, and tiers T0 to T2 of its verification."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from upcycle.data.evaluation import Evaluation
from upcycle.ir.spec import Plan
from upcycle.ir.weights import Provenance
from upcycle.models.dense import Source
from upcycle.models.expert_sources import Sources
from upcycle.passes.plan.costs import costs, model_size
from upcycle.targets.checkpoint import planned_layers
from upcycle.util.module_facts import model_dtype
from upcycle.verification.checks import END_TO_END, check
from upcycle.verification.source_distances import source_distances
from upcycle.verification.whole_model import budget, compare_models, verify_layers
from upcycle.version import __version__


def header(plan: Plan, model: nn.Module, source: Source | None) -> dict[str, Any]:
    """The report before anything is measured."""
    return {
        "upcycle": __version__,
        "model": source.label if source else type(model).__qualname__,
        "recipe": plan.recipe_name,
        "resolved_recipe": plan.recipe.model_dump(mode="json"),
        "promise": plan.promise,
        "dtype": str(model_dtype(model)).removeprefix("torch."),
        "torch": torch.__version__,
        "costs": costs(plan, *model_size(model)).to_json(),
        "checks": [],
    }


def verify_conversion(
    report: dict[str, Any],
    plan: Plan,
    dense: nn.Module,
    converted: nn.Module,
    provenance: Mapping[str, Provenance],
    evaluation: Evaluation,
    sources: Sources,
) -> None:
    """Measure tiers T0 to T2 into `report`; both models are in evaluation mode."""
    layers = list(planned_layers(converted, plan))
    rows, checks = verify_layers(dense, converted, layers, provenance, evaluation, sources.tensors)
    report["layers"] = rows
    report["checks"] += checks
    with torch.no_grad():
        report["end_to_end"] = compare_models(dense, converted, evaluation)
        if sources.names:
            report["sources"] = source_distances(dense, converted, sources, evaluation)
    allowed = budget(plan.recipe, model_dtype(dense))
    report["checks"].append(check(END_TO_END, report["end_to_end"]["relative"], allowed))
    worst = max(rows, key=lambda row: row["relative"])
    report["largest_error_at"] = {"layer": worst["path"], "relative": worst["relative"]}
