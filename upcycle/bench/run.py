"""A whole benchmark of a converted directory, as plain data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from upcycle.bench.engines import check_file, onnx_engine, torch_engine
from upcycle.bench.floor import floor_of
from upcycle.bench.machine import measure
from upcycle.bench.measures import Subject, Tick, layer_rows, reading_rows, six, writing_row
from upcycle.bench.training import training_row
from upcycle.capture.capture import ExampleInputs
from upcycle.conversion.trained import planned
from upcycle.data.verification_inputs import evaluation_for
from upcycle.errors import UsageError
from upcycle.models.dense import Source
from upcycle.models.load_options import DTYPES
from upcycle.passes.plan.costs import costs, model_size
from upcycle.targets.load import load
from upcycle.targets.traced.arguments import arguments_of
from upcycle.util.modules import model_dtype
from upcycle.util.progress import Progress, silent


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        tokens: numbers of tokens at a time.
        layers: number of converted layers, from the middle outwards; 0 is all.
        seconds: for each figure, at least five rounds.
        threads: of the engine; None leaves them as they are.
        training: measure training steps, too, in torch.
    """

    tokens: Sequence[int] = (1, 16, 256, 2048)
    layers: int = 1
    seconds: float = 2.0
    engine: Literal["torch", "onnx"] = "torch"
    threads: int | None = None
    training: bool = False

    def check_no_training(self) -> None:
        """Refuse to train what only ONNX Runtime runs.

        Raises:
            UsageError: training is wanted.
        """
        if self.training:
            raise UsageError("training: ONNX Runtime trains nothing here; measure it in torch")


@torch.no_grad()
def bench(
    converted: Path, dense: Source, wanted: Wanted, progress: Progress = silent
) -> dict[str, Any]:
    """Measure a converted model, trained since or not, beside the dense one, on the CPU.

    Returns:
        ``machine``, ``costs``, ``memory`` (bytes of the weights in the computation), ``disk``
        (bytes of the files that the engine reads); the times of both models and their ratio for
        ``layers``, ``reading``, ``writing``, which is None for a model that writes no text, and
        ``training``, None unless wanted; and ``six``, the metrics of EfficientLLM. What cannot be
        measured is None.

    Raises:
        UsageError: the directory cannot be loaded, or has no file for the engine.
        UnsupportedError: its layers are not where the dense model has FFNs.
    """
    if wanted.engine == "onnx":
        check_file(converted)
        wanted.check_no_training()
    dense = dense.fetched(progress)
    with ExitStack() as stack:
        stack.enter_context(_threads(wanted.threads))
        makers: dict[str, Callable[[], nn.Module]] = {
            "converted": partial(_load, converted, dense),
        }
        made = makers["converted"]()
        dense = replace(dense, dtype=model_dtype(made))
        makers = {"dense": dense.load, **makers}
        reference = makers["dense"]()
        plan, report = planned(converted, made, reference, dense)
        evaluation = evaluation_for(
            reference,
            directory=dense.directory,
            trust_remote_code=dense.trust_remote_code,
            example=dense.example,
        )
        specs = [plan.specs[i] for i in _middle(len(plan.specs), wanted.layers)]
        onnx = plan.recipe.onnx if wanted.engine == "onnx" else None
        kind = DTYPES[report.dtype] if onnx is None else torch.float32
        machine = measure(kind)
        floor = floor_of(machine, reference, plan.specs, itemsize=kind.itemsize, options=onnx)
        if onnx is None:
            engine = torch_engine(reference, made, specs, makers)
        else:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            threads = torch.get_num_threads()
            engine = onnx_engine(
                reference, made, converted, specs, evaluation, folder=folder, threads=threads
            )
            batches: list[ExampleInputs] = [  # by the names of the file's inputs
                arguments_of(reference, batch).tensors for batch in evaluation.batches
            ]
            evaluation = replace(evaluation, batches=batches)
        size = costs(plan, *model_size(reference))
        subject = Subject(reference, evaluation, engine, floor, wanted.seconds)
        total = (len(engine.pairs) + 1) * len(wanted.tokens) + 3 + wanted.training
        tick = _ticker(progress, total)
        reading = reading_rows(subject, wanted.tokens, tick)
        writing = writing_row(subject, tick)
        parameters = {
            "dense": size.parameters_before,
            "converted": size.parameters_after,
            "active": size.active_parameters,
        }
        found = {
            "model": report.model,
            "recipe": report.recipe,
            "engine": wanted.engine,
            "machine": asdict(machine),
            "costs": size.to_json(),
            "memory": floor.weight_bytes(size.parameters_before),
            "disk": engine.disk or {"dense": size.bytes_before, "converted": size.bytes_on_disk},
            "layers": layer_rows(subject, wanted.tokens, tick),
            "reading": reading,
            "writing": writing,
            "training": training_row(subject, max(wanted.tokens), parameters, tick)
            if wanted.training
            else None,
            "six": six(subject, writing or reading[-1], size, report, tick),
        }
        progress("measuring", total, total)
        return found


def _load(converted: Path, dense: Source) -> nn.Module:
    own = None if (converted / "config.json").is_file() else dense.load()
    return load(converted, model=own, trust_remote_code=dense.trust_remote_code)


def _middle(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` layers, from the middle outwards, in order; all if 0."""
    order = sorted(range(count), key=lambda i: (abs(i - count // 2), i))
    return sorted(order[: wanted or None])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def _ticker(progress: Progress, total: int) -> Tick:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("measuring", min(done, total - 1), total)

    progress("measuring", 0, total)
    return tick
