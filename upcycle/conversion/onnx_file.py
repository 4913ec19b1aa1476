"""ONNX in, ONNX out: convert a file into a directory, and verify it in ONNX Runtime."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upcycle.conversion.onnx_rewrite import FILE, write_converted
from upcycle.data.calibration_files import CalibrationInput
from upcycle.data.onnx_calibration import onnx_calibration, verification_feeds
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.spec import Plan, router_kind
from upcycle.layers.moe import MoE
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.inputs import Array
from upcycle.onnx.run import run
from upcycle.onnx.tensors import TORCH_TYPES
from upcycle.passes.plan.calibration_needs import needs
from upcycle.recipe.reader import dump_recipe
from upcycle.recipe.schema import Recipe
from upcycle.targets.card import onnx_card
from upcycle.targets.files.staging import staged
from upcycle.targets.files.stored import Stored
from upcycle.targets.files.tensor_file import check_disk
from upcycle.targets.onnx.insert import unique_keys
from upcycle.targets.onnx.share_weights import Store
from upcycle.targets.provenance_file import write_origins
from upcycle.util.json_text import json_text
from upcycle.util.progress import Progress, step
from upcycle.verification.checks import Check
from upcycle.verification.onnx.layers import (
    compare_outputs,
    end_to_end,
    feeds_for,
    stored_layer,
    verify_onnx_layers,
)
from upcycle.verification.onnx.rounding import verify_rounding
from upcycle.verification.whole_model import raise_if_failed
from upcycle.version import __version__

FLOAT = "float"  # the folder of the float experts while a file is made that has rounded ones


def convert_onnx(
    source: OnnxSource,
    recipe: Recipe,
    *,
    recipe_name: str,
    out: Path,
    targets: Sequence[str],
    calibration: CalibrationInput | None = None,
    max_shard_size: int,
    overwrite: bool,
    verify: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Convert an ONNX file into a directory and return the report, which is also written there.

    Peak memory: the graph with the weights inside the file, one FFN, and what it becomes.

    Raises:
        UsageError: the file is broken, or another target than ONNX is asked for.
        UnsupportedError: no FFN can be converted, or ONNX Runtime cannot run the file.
        PlanError: the recipe does not fit.
        VerificationError: the result is further from the dense file than promised.
    """
    if "onnx" not in targets:
        raise UsageError("--target safetensors: an ONNX file becomes an ONNX file; leave it out")
    with step(progress, "capturing"):
        plan = source.plan(recipe, recipe_name)
        report = _header(source, plan)
    _check_routers(plan)
    _check_dtype(plan.recipe)
    check_disk(out, report["costs"]["bytes_on_disk"])
    feeds, dense = verification_feeds(source, calibration), {}
    feeds = feeds_for(source, recipe.seed) if feeds is None else feeds
    shown = onnx_calibration(source, recipe, calibration) if needs(recipe) else None
    if verify:
        with step(progress, "running the dense file"):
            dense = run(source.path, feeds)
    with staged(out, overwrite=overwrite, protect=[source.path]) as directory:
        beside = directory / FLOAT if plan.recipe.onnx.may_round else directory
        beside.mkdir(exist_ok=True)
        stored, origins, rows = write_converted(
            source,
            plan,
            directory,
            beside=beside,
            max_shard_size=max_shard_size,
            progress=progress,
            calibration=shown,
        )
        if shown is not None:
            report["calibration"] = shown.describe() | {"layers": rows}
        if verify:
            rows, checks = verify_onnx_layers(
                source,
                plan,
                directory / FILE,
                beside=beside,
                stored=stored,
                origins=origins,
                feeds=feeds,
                progress=progress,
            )
            found = compare_outputs(dense, run(directory / FILE, feeds), feeds)
            rounded, more = _verify_rounding(source, directory / FILE, plan, stored, beside, feeds)
            if rounded:  # then the outputs are off by more than the recipe says: it is only told
                report["rounding"] = {"layers": rounded}
                checks += more
            else:
                checks.append(end_to_end(recipe, found["relative"], _dtype(source, plan)))
            worst = max(rows, key=lambda row: row["relative"])
            where = {"layer": worst["path"], "relative": worst["relative"]}
            report |= {"layers": rows, "end_to_end": found, "largest_error_at": where}
            report["checks"] += checks
            raise_if_failed(report)
        if beside != directory:
            shutil.rmtree(beside)
        (directory / "recipe.yaml").write_text(dump_recipe(plan.recipe), encoding="utf-8")
        (directory / "report.json").write_text(json_text(report), encoding="utf-8")
        write_origins(directory, plan, origins)
        text = onnx_card(out.absolute().name, plan, report)
        (directory / "README.md").write_text(text, encoding="utf-8")
    return report


def _verify_rounding(
    source: OnnxSource,
    path: Path,
    plan: Plan,
    stored: Mapping[str, Stored],
    beside: Path,
    feeds: Mapping[str, Array],
) -> tuple[list[dict[str, Any]], list[Check]]:
    """What rounding did to the layers, if any is rounded."""
    if not plan.recipe.onnx.may_round:
        return [], []
    store = Store(beside, {})
    keys = unique_keys({path: len(found) for path, found in source.found.regions.items()})
    layers: dict[str, MoE] = {}
    for spec in plan.specs:
        layer = stored_layer(spec, stored, store)
        layers |= dict.fromkeys(keys[spec.ffn.path], layer)
    return verify_rounding(path, layers, [feeds])


def verify_onnx_files(
    source: OnnxSource, converted: Path, report: dict[str, Any], recipe: Recipe
) -> dict[str, Any]:
    """Compare a written file with the dense one again (tier T2); returns `report` with that."""
    path = converted / FILE
    if not path.is_file():
        raise UsageError(f"{converted}: it has no {FILE} to compare with {source.path.name}")
    feeds = feeds_for(source, recipe.seed)
    found = compare_outputs(run(source.path, feeds), run(path, feeds), feeds)
    dtype: torch.dtype = getattr(torch, report["dtype"])
    checks = [end_to_end(recipe, found["relative"], dtype)]
    kept = {k: v for k, v in report.items() if k not in ("largest_error_at", "layers")}
    return kept | {"end_to_end": found, "checks": checks}


def _check_routers(plan: Plan) -> None:
    """Refuse routers that read what a foreign graph does not have, or that no one wants in one."""
    for spec in plan.specs:
        kind = router_kind(spec.router)
        if kind == "oracle":
            raise UnsupportedError(
                f"{spec.ffn.path}: an oracle runs every expert to choose some, which is for "
                "comparing other routers with; use another router"
            )
        if kind == "table":
            raise UnsupportedError(
                f"{spec.ffn.path}: its router reads {spec.router.by} ids, and an ONNX file does "
                "not say which of its inputs they are; convert the model that it was exported from"
            )


def _check_dtype(recipe: Recipe) -> None:
    """Refuse a type that is not the file's own."""
    if recipe.onnx.dtype not in ("auto", "float32"):
        raise UsageError(
            f"onnx.dtype: {recipe.onnx.dtype}: an ONNX file keeps its type, and its layers compute "
            "in float32; leave it out, or convert the model that the file was exported from"
        )


def _dtype(source: OnnxSource, plan: Plan) -> torch.dtype:
    return TORCH_TYPES[source.found.weights.dtype(plan.specs[0].ffn.contraction.weight)]


def _header(source: OnnxSource, plan: Plan) -> dict[str, Any]:
    return {
        "upcycle": __version__,
        "model": source.label,
        "recipe": plan.recipe_name,
        "resolved_recipe": plan.recipe.model_dump(mode="json"),
        "promise": plan.promise,
        "dtype": str(_dtype(source, plan)).removeprefix("torch."),
        "torch": torch.__version__,
        "costs": source.costs(plan).to_json(),
        "checks": [],
    }
