"""What the commands do: named models in, directories and reports out."""

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from upcycle.conversion.emit import check_targets
from upcycle.conversion.in_memory import convert
from upcycle.conversion.streamed import check_streamable, convert_streamed, must_stream
from upcycle.conversion.workers import HERE, Workers, check_workers
from upcycle.data.calibration import calibration_data, verification_inputs
from upcycle.data.calibration_files import read_calibration
from upcycle.data.evaluation import evaluation_for
from upcycle.errors import UsageError
from upcycle.models.dense import DTYPES, Source
from upcycle.models.expert_sources import check_sources
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.calibration_needs import needs
from upcycle.passes.plan.costs import costs, model_size
from upcycle.passes.plan.model_problems import check_model
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.schema import Recipe
from upcycle.targets.destination import destination, onnx_destination
from upcycle.targets.files.tensor_file import MAX_SHARD_SIZE, check_disk
from upcycle.targets.load import load
from upcycle.targets.onnx.parts import FILES as ONNX_FILES
from upcycle.util.module_facts import device_of, model_dtype
from upcycle.util.progress import Progress, silent, step
from upcycle.verification.checks import END_TO_END, check
from upcycle.verification.onnx.files import in_float32, verify_onnx
from upcycle.verification.whole_model import budget, compare_models

if TYPE_CHECKING:
    from upcycle.models.onnx_file import OnnxSource


def convert_model(
    source: "Source | OnnxSource",
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    targets: Sequence[str] = ("safetensors",),
    runtimes: Sequence[str] = (),
    architecture: str | None = None,
    calibration: Sequence[str] = (),
    text_field: str = "text",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = True,
    stream: bool | None = None,
    resume: bool = False,
    workers: Workers = HERE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Convert a named model into a directory and return the report, which is also written there.

    Everything that can be refused is refused before the weights are read. `runtimes` have to run
    the result, and `architecture` is what it is written in. `stream` (also if it is
    None and the memory is too small) works piece by piece, and `resume` goes on with a run of that
    kind that was interrupted; see `upcycle.conversion.streamed`. `workers` make the layers.
    """
    check_targets(targets, verify=verify)
    check_workers(workers)
    if "onnxruntime" in runtimes and "onnx" not in targets:
        raise UsageError("--runtime onnxruntime: it runs the file of --target onnx; add that")
    _check_out(out, source, overwrite=overwrite)
    given = read_calibration(calibration, field=text_field) if calibration else None
    if not isinstance(source, Source):
        from upcycle.conversion.onnx_file import convert_onnx

        if stream or resume:
            raise UsageError("--stream: it does not apply to an ONNX file; leave it out")
        _check_gradients(recipe, "an ONNX file")
        if recipe.experts.sources:
            raise UsageError(
                "an ONNX file is read by itself, and the recipe takes experts from other models; "
                "convert the model directory that it came from"
            )
        onnx_destination(source.plan(recipe, recipe_name).requiring(runtimes, architecture))
        return convert_onnx(
            source,
            recipe,
            recipe_name=recipe_name,
            out=out,
            targets=targets,
            calibration=given,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
        )
    with step(progress, "capturing"):
        skeleton = source.skeleton()
        located = locate_in(skeleton, source.example)
    plan = make_plan(located, recipe, recipe_name=recipe_name).requiring(runtimes, architecture)
    check_model(skeleton, plan)
    destination(skeleton, plan)
    if given is not None:  # the model may read something else, or there is no tokenizer for it
        text, example = verification_inputs(skeleton, recipe, given, directory=source.directory)
        evaluation_for(skeleton, directory=source.directory, example=example, text=text)
        if needs(recipe):
            count = plan.specs[0].num_experts
            calibration_data(skeleton, recipe, given, directory=source.directory, domains=count)
    check_sources(recipe.experts.sources, skeleton, source)
    total, itemsize = model_size(skeleton)
    itemsize = itemsize if source.dtype is None else source.dtype.itemsize
    estimate = costs(plan, total, itemsize)
    check_disk(out, estimate.bytes_on_disk)
    if stream or resume or (stream is None and source.directory and must_stream(estimate)):
        check_streamable(source, targets)
        _check_gradients(recipe, "a model that is converted piece by piece")
        if recipe.experts.sources and needs(recipe):
            raise UsageError(
                "a model that is converted piece by piece cannot be calibrated on the merge of "
                "several models; take a router that needs no data, or pass --no-stream"
            )
        return convert_streamed(
            source,
            plan,
            skeleton,
            out,
            calibration=given,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            resume=resume,
            verify=verify,
            workers=workers,
            progress=progress,
        )
    del skeleton
    with step(progress, "loading"):
        model = source.load()
    result = convert(
        model,
        recipe,
        source.example,
        given,
        verify=verify,
        recipe_name=recipe_name,
        source=source,
        located=located,
        workers=workers,
        progress=progress,
    )
    gc.collect()
    result.save(
        out,
        targets=targets,
        runtimes=runtimes,
        architecture=architecture,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        verify=verify,
        progress=progress,
    )
    return result.report


def _check_gradients(recipe: Recipe, what: str) -> None:
    """Refuse a recipe that needs a backward pass where there is none."""
    if "gradients" in needs(recipe):
        raise UsageError(
            f"{what} is run forwards only, and the recipe's methods look at gradients; convert a "
            "model that fits in memory, or use another recipe"
        )
    if recipe.experts.adaptive:
        raise UsageError(
            f"{what} is not run before it is converted, as `experts.adaptive` needs; set it to "
            "false, or convert a model that fits in memory"
        )


def _check_out(out: Path, source: "Source | OnnxSource", *, overwrite: bool) -> None:
    """Refuse now what `staged` would refuse after the work."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UsageError(f"{out}: it exists already; choose another --out or pass --overwrite")
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out}: it is not a directory; choose another --out")
    if source.directory and source.directory.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: it contains the dense model; choose another --out")


def read_report(directory: Path) -> Mapping[str, Any]:
    """The ``report.json`` of a converted model."""
    path = directory / "report.json"
    if not path.is_file():
        raise UsageError(f"{directory}: no report.json, so this is not an output of upcycle")
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {"recipe", "resolved_recipe", "dtype"} <= set(data):
            return data
    except ValueError:
        pass
    raise UsageError(f"{path}: not a report of upcycle; convert the model again")


def verify_paths(dense: "Source | OnnxSource", converted: Path) -> dict[str, Any]:
    """Compare a written model with its dense one, as a user would load it (tiers T2 and T4)."""
    report = dict(read_report(converted))
    recipe = Recipe.model_validate_json(json.dumps(report["resolved_recipe"]))
    if not isinstance(dense, Source):
        from upcycle.conversion.onnx_file import verify_onnx_files

        return verify_onnx_files(dense, converted, report, recipe)
    if dense.dtype is None:  # as it was loaded for the conversion
        dense = replace(dense, dtype=DTYPES[report["dtype"]])
    reference = dense.load()
    given = None if isinstance(reference, PreTrainedModel) else dense.load()
    other = load(converted, model=given).to(device_of(reference))
    evaluation = evaluation_for(reference, directory=dense.directory, example=dense.example)
    report["end_to_end"] = compare_models(reference, other, evaluation)
    allowed = budget(recipe, model_dtype(reference))
    report["checks"] = [check(END_TO_END, report["end_to_end"]["relative"], allowed)]
    if any((converted / name).is_file() for name in ONNX_FILES):
        report["checks"] += verify_onnx(converted, in_float32(other), evaluation)
    report.pop("largest_error_at", None)  # of the conversion, which this is not
    report.pop("layers", None)
    return report
