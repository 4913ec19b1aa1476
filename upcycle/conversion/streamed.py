"""Convert a checkpoint that does not fit in memory: one FFN and one tensor at a time.

Names, order and shapes come from the model on the meta device, the numbers from the checkpoint's
memory map. The same pure transform makes the weights of each layer, and the same writer writes the
same bytes as a conversion in memory. Each layer is verified by itself, from the written file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.conversion.streamed_calibration import Spool, as_stored, calibrate_mapped
from upcycle.conversion.workers import HERE, Workers, layer_maker, local_jobs, single_threads
from upcycle.data.calibration import calibration_data
from upcycle.data.calibration_files import CalibrationInput
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.layer_weights import layer_around
from upcycle.ir.partial_projection import read_kept
from upcycle.ir.spec import MoESpec, Plan
from upcycle.ir.weights import FFNWeights, MoEWeights, Provenance, read_ffn
from upcycle.layers.tap import install
from upcycle.models.dense import DTYPES, Source
from upcycle.models.expert_sources import BASE, Merged, Sources, open_sources
from upcycle.models.module_tensors import by_module_name
from upcycle.passes.plan.calibration_needs import needs
from upcycle.passes.plan.costs import Costs
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import dump_recipe
from upcycle.targets.card import card
from upcycle.targets.checkpoint import Checkpoint, Content, write_checkpoint
from upcycle.targets.companions import copy_companions
from upcycle.targets.files.manifest import Manifest
from upcycle.targets.files.read_back import read_layer
from upcycle.targets.files.staging import publish
from upcycle.targets.files.tensor_file import MAX_SHARD_SIZE
from upcycle.targets.provenance_file import write_origins
from upcycle.util.json_text import json_text
from upcycle.util.memory import give_back
from upcycle.util.progress import Progress, silent
from upcycle.verification.layers import layer_checks, layer_report, random_tokens
from upcycle.verification.whole_model import raise_if_failed
from upcycle.version import __version__

SPOOL = "upcycle-layers"  # in a partial directory, what calibration made


def must_stream(costs: Costs) -> bool:
    """Whether the dense and the converted model together would fill most of the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return costs.peak_bytes > 0.8 * free


def check_streamable(source: Source, targets: Sequence[str]) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        UsageError: the model is no directory of safetensors files, or another target was asked for.
    """
    if source.directory is None or source.dtype is not None or source.device != "cpu":
        raise UsageError(
            "a model that is converted piece by piece is a directory of safetensors files in its "
            "own dtype, on the CPU; leave --dtype and --device out, or pass --no-stream"
        )
    if tuple(targets) != ("safetensors",):
        raise UsageError(
            "a model that is converted piece by piece is never whole in memory, and ONNX export "
            "needs that; pass --target safetensors"
        )


def convert_streamed(
    source: Source,
    plan: Plan,
    skeleton: nn.Module,
    out: Path,
    *,
    calibration: CalibrationInput | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    workers: Workers = HERE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the converted checkpoint of a Hugging Face directory, and return the report.

    Peak memory: one FFN, what it becomes, and the largest tensor; for a recipe that looks at
    activations also those (see `upcycle.conversion.streamed_calibration`). It is calibrated anew by
    `resume`.

    Args:
        source: a directory of safetensors files.
        plan: what is converted.
        skeleton: the dense model on the meta device; it is changed.
        out: the directory; it is written as ``<out>.partial`` and renamed at the end.
        calibration: data that the user gave.
        max_shard_size: bytes of one file.
        overwrite: replace `out` if it exists.
        resume: go on with the ``<out>.partial`` of an interrupted run; else it is removed.
        verify: trace and compare each layer as it was written (tiers T0 and T1).
        workers: where layers are made that need no calibration; on this machine its jobs are also
            the layers that are verified at a time.

    Raises:
        UnsupportedError: the checkpoint names its tensors otherwise than the model does.
        VerificationError: a written layer is not what was promised.
    """
    assert source.directory is not None
    tensors = _by_module_name(source, skeleton)
    dtype = tensors[plan.specs[0].ffn.parameters[0]].dtype
    experts = plan.recipe.experts
    sources = open_sources(experts.sources, skeleton, source, held=tensors)
    if sources.names:
        tensors = Merged(tensors, sources, experts.merge)
    converted = _converted_skeleton(skeleton, plan, dtype)
    mapped, data = None, None
    if needs(plan.recipe):
        mapped = source.load(mapped=True)
        data = calibration_data(
            mapped,
            plan.recipe,
            calibration,
            directory=source.directory,
            example=source.example,
            domains=plan.specs[0].num_experts,
        )
    provenance: dict[str, Provenance] = {}

    def dense(spec: MoESpec) -> FFNWeights:
        return read_ffn(spec.ffn, tensors, sources.tensors)

    kept = {kept.name: kept for spec in plan.specs for kept in spec.ffn.kept}

    def tensor(name: str) -> torch.Tensor:
        return read_kept(kept[name], tensors) if name in kept else tensors[name]

    report = _header(source, plan, dtype)
    with (
        _resumable(out, resume=resume) as directory,
        layer_maker(workers, plan.specs, dense) as make,
    ):

        def layer(spec: MoESpec) -> MoEWeights:
            give_back()  # the layer before has been written
            made = make(spec)
            provenance[spec.ffn.path] = made.provenance
            progress("converting", len(provenance), len(plan.specs))
            return made

        content = Content(tensor=tensor, layer=layer)
        digest = None if data is None else data.digest
        manifest = Manifest(directory, _key(source, plan, max_shard_size, digest))
        if mapped is not None and data is not None:
            spool = Spool(directory / SPOOL, plan.specs)
            report["calibration"] = calibrate_mapped(mapped, plan, data, spool, progress)
            content, provenance = Content(tensor=tensor, layer=spool.get), spool.provenance
            del mapped
        copy_companions(source.directory, directory)
        written = write_checkpoint(
            directory,
            converted,
            plan,
            content=content,
            max_shard_size=max_shard_size,
            log=manifest,
        )
        report["checkpoint"] = written.to_json()
        for spec in plan.specs:
            if spec.ffn.path not in provenance:  # its file was whole already
                provenance[spec.ffn.path] = transform(dense(spec), spec).provenance
        if verify:
            rows = _verify(
                directory, plan, written, tensors, sources, provenance, workers, progress
            )
            report["layers"] = rows
            report["checks"] += layer_checks(rows, DTYPES[report["dtype"]])
            raise_if_failed(report)
        _describe(directory, plan, written, report, out.name)
        write_origins(directory, plan, provenance)
        shutil.rmtree(directory / SPOOL, ignore_errors=True)
        manifest.remove()
        publish(directory, out, overwrite=overwrite, protect=[source.directory])
    return report


@contextmanager
def _resumable(out: Path, *, resume: bool) -> Iterator[Path]:
    """``<out>.partial``: it stays if the run is interrupted, and goes if the run fails."""
    directory = out.absolute().with_name(f"{out.name}.partial")
    if not resume:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _by_module_name(source: Source, skeleton: nn.Module) -> Mapping[str, torch.Tensor]:
    """The checkpoint under the names of the module; a prefix of the base model is seen through."""
    assert source.directory is not None
    tensors = by_module_name(source.directory, skeleton)
    if not isinstance(tensors, str):
        return tensors
    raise UnsupportedError(
        f"{source.directory}: the checkpoint has no tensor {tensors}, so it cannot be converted "
        "piece by piece; convert it in memory (without --stream)"
    )


def _converted_skeleton(skeleton: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    skeleton.to(dtype)
    with torch.device("meta"):
        layers = install(skeleton, [spec.site() for spec in plan.specs])
    for layer in layers:
        as_stored(layer, dtype)
    return skeleton


def _key(source: Source, plan: Plan, max_shard_size: int, data: str | None) -> str:
    """What a partial directory is a part of: version, model files, decisions, sizes, data."""
    assert source.directory is not None
    others = [Path(name) for name in plan.recipe.experts.sources if name != BASE]
    files = [
        file
        for folder in (source.directory, *others)
        for file in (*sorted(folder.glob("*.safetensors")), folder / "config.json")
        if file.exists()
    ]
    facts = [
        __version__,
        [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        plan.recipe.model_dump(mode="json"),
        [spec.site() for spec in plan.specs],
        max_shard_size,
        data,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _header(source: Source, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "upcycle": __version__,
        "model": source.label,
        "recipe": plan.recipe_name,
        "resolved_recipe": plan.recipe.model_dump(mode="json"),
        "promise": plan.promise,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "streamed": "layer by layer; the whole model was not run",
        "checks": [],
    }


def _verify(
    directory: Path,
    plan: Plan,
    written: Checkpoint,
    tensors: Mapping[str, torch.Tensor],
    sources: Sources,
    provenance: Mapping[str, Provenance],
    workers: Workers,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Tiers T0 and T1 on each layer as it is in the file, with random tokens."""

    def row(spec: MoESpec) -> dict[str, Any]:
        layer = layer_around(spec.layer_config(), read_layer(directory, written, spec))
        x_TD, origin = random_tokens(spec, layer), provenance[spec.ffn.path]
        return layer_report(spec, layer, x_TD, tensors, origin, sources.tensors)

    rows: list[dict[str, Any]] = []
    with single_threads(local_jobs(workers, plan.specs)) as pool:
        for made in pool.map(row, plan.specs):
            give_back()
            rows.append(made)
            progress("verifying", len(rows), len(plan.specs))
    return rows


def _describe(
    directory: Path, plan: Plan, written: Checkpoint, report: dict[str, Any], name: str
) -> None:
    (directory / "recipe.yaml").write_text(dump_recipe(plan.recipe), encoding="utf-8")
    (directory / "report.json").write_text(json_text(report), encoding="utf-8")
    text = card(name, plan, written, ["safetensors"], report)
    (directory / "README.md").write_text(text, encoding="utf-8")
