"""What the commands do: named models in, directories and reports out."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from upcycle.compiler import Progress, convert, silent
from upcycle.emit import check_targets, load, verify_onnx
from upcycle.errors import UsageError
from upcycle.evaluation import evaluation_for
from upcycle.ffn import Located
from upcycle.passes.locate import locate_in
from upcycle.passes.plan import make_plan
from upcycle.recipe import Recipe
from upcycle.source import Source
from upcycle.spec import Plan
from upcycle.targets.tensor_file import MAX_SHARD_SIZE
from upcycle.verification import budget, check, compare_models, model_dtype


def inspect_model(source: Source) -> Located:
    """The FFNs and misses of a named model; no weight is read where a configuration is enough."""
    return locate_in(source.skeleton(), source.example)


def plan_model(source: Source, recipe: Recipe, recipe_name: str) -> Plan:
    """What a conversion would do, from the configuration alone."""
    return make_plan(inspect_model(source), recipe, recipe_name=recipe_name)


def convert_model(
    source: Source,
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    targets: Sequence[str] = ("safetensors",),
    calibration: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Convert a named model into a directory and return the report, which is also written there.

    Everything that can be refused is refused before the weights are read.
    """
    check_targets(targets)
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: it exists already; choose another --out or pass --overwrite")
    progress("capturing", 0, 1)
    located = inspect_model(source)
    make_plan(located, recipe, recipe_name=recipe_name)
    text = _text(calibration)
    progress("capturing", 1, 1)
    progress("loading", 0, 1)
    model = source.load()
    progress("loading", 1, 1)
    result = convert(
        model,
        recipe,
        source.example,
        text,
        verify=verify,
        source=source,
        located=located,
        progress=progress,
    )
    result.plan = Plan(result.plan.located, result.plan.specs, recipe, recipe_name)
    result.report["recipe"] = recipe_name
    gc.collect()
    progress("writing", 0, 1)
    result.save(
        out, targets=targets, overwrite=overwrite, max_shard_size=max_shard_size, verify=verify
    )
    progress("writing", 1, 1)
    return result.report


def _text(calibration: str | None) -> str | None:
    if calibration is None:
        return None
    path = Path(calibration)
    if not path.is_file():
        raise UsageError(f"--calibration {calibration}: there is no such text file")
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise UsageError(f"--calibration {calibration}: not a text file in UTF-8") from error


def read_report(directory: Path) -> Mapping[str, Any]:
    """The ``report.json`` of a converted model."""
    path = directory / "report.json"
    if not path.is_file():
        raise UsageError(f"{directory}: no report.json, so this is not an output of upcycle")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def verify_paths(dense: Source, converted: Path) -> dict[str, Any]:
    """Compare a written model with its dense one, as a user would load it (tiers T2 and T4)."""
    report = dict(read_report(converted))
    reference = dense.load()
    other = load(converted, model=None if isinstance(reference, PreTrainedModel) else reference)
    evaluation = evaluation_for(reference, directory=dense.directory, example=dense.example)
    report["end_to_end"] = compare_models(reference, other, evaluation)
    recipe = Recipe.model_validate(_tuples(report["resolved_recipe"]))
    plan = Plan(Located(), (), recipe, report["recipe"])
    report["checks"] = [
        check("end to end", report["end_to_end"]["relative"], budget(plan, model_dtype(reference)))
    ]
    if (converted / "model.onnx").is_file():
        report["checks"] += verify_onnx(converted / "model.onnx", other, evaluation)
    return report


def _tuples(data: Any) -> Any:
    """JSON has lists where a recipe has tuples."""
    if isinstance(data, dict):
        return {key: _tuples(value) for key, value in data.items()}
    return tuple(data) if isinstance(data, list) else data
