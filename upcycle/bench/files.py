"""A benchmark of a converted ONNX file beside the dense one, in ONNX Runtime, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.bench.machine import measure
from upcycle.bench.meters import SIX
from upcycle.bench.onnx_models import opened
from upcycle.bench.run import Wanted
from upcycle.bench.timing import compared, interleaved
from upcycle.errors import UsageError
from upcycle.models.onnx_file import OnnxSource
from upcycle.onnx.external_data import stored_bytes
from upcycle.onnx.inputs import Array
from upcycle.passes.plan.costs import costs
from upcycle.targets.description import read_report, recipe_of
from upcycle.targets.onnx.file_names import MODEL
from upcycle.targets.provenance_file import as_made
from upcycle.util.progress import Progress, silent
from upcycle.verification.onnx.layers import feeds_for


def bench_files(
    converted: Path, dense: OnnxSource, wanted: Wanted, progress: Progress = silent
) -> dict[str, Any]:
    """Measure a file that ``upcycle convert`` wrote beside the file that it was made from.

    Returns:
        As `upcycle.bench.run.bench`; ``reading`` has a row for the inputs as they are (``tokens``
        is None) and, where the first axis of all inputs is a batch, for each of `wanted.tokens` as
        its size. Layers, writing and the six metrics are not measured.

    Raises:
        UsageError: the directory holds no converted file, or that of another model.
    """
    wanted.check_no_training()
    file = converted / MODEL
    if not file.is_file():
        raise UsageError(f"{converted}: no {MODEL} is here")
    report = read_report(converted)
    feeds = feeds_for(dense, seed=0)
    plan, _ = as_made(dense.plan(recipe_of(report, converted), report.recipe), converted)
    threads = wanted.threads or torch.get_num_threads()
    runners = {"dense": opened(dense.path, threads), "converted": opened(file, threads)}
    sizes: list[int | None] = [None, *(wanted.tokens if _has_batch(dense, feeds) else ())]
    rows = []
    for done, count in enumerate(sizes):
        progress("measuring", done, len(sizes))
        given = feeds if count is None else {name: _tiled(a, count) for name, a in feeds.items()}
        calls = {
            name: lambda runner=runner, given=given: runner.run(None, given)
            for name, runner in runners.items()
        }
        found = interleaved(calls, seconds=wanted.seconds)
        rows.append({"tokens": count} | compared(found, {"dense": None, "converted": None}))
    progress("measuring", len(sizes), len(sizes))
    size = costs(plan, *dense.size)
    disk = {"dense": stored_bytes(dense.path), "converted": stored_bytes(file)}
    return {
        "model": report.model,
        "recipe": report.recipe,
        "engine": "onnx",
        "unit": "examples",
        "machine": asdict(measure(torch.float32)),
        "costs": size.to_json(),
        "memory": disk,
        "disk": disk,
        "layers": [],
        "reading": rows,
        "writing": None,
        "six": {name: dict.fromkeys(SIX) for name in runners},
    }


def _has_batch(dense: OnnxSource, feeds: Mapping[str, Array]) -> bool:
    """Whether the first axis of every input may be as long as one likes, and is the same."""
    first = set()
    for value in dense.model.graph.inputs:
        axis = next(iter(value.shape or ()), 0)
        first.add(axis if isinstance(axis, int) else str(axis.value))
    lengths = {array.shape[:1] for array in feeds.values()}
    return len(first) == 1 and not isinstance(next(iter(first)), int) and len(lengths) == 1


def _tiled(array: Array, count: int) -> Array:
    return np.resize(array, (count, *array.shape[1:]))
