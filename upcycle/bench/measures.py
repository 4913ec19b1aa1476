"""Each figure of a benchmark, as plain data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.bench.alone import Job, measured_alone
from upcycle.bench.engines import Calls, Engine
from upcycle.bench.floor import Floor
from upcycle.bench.layers import inputs_of
from upcycle.bench.meters import six_metrics
from upcycle.bench.timing import MOST, compared, interleaved
from upcycle.bench.whole import PROMPT, text_of
from upcycle.data.text import longest
from upcycle.data.verification_inputs import Evaluation
from upcycle.ir.measured import Costs
from upcycle.ir.report import Report

STEPS = 20  # tokens to write, at least
Tick = Callable[[], None]


@dataclass(frozen=True)
class Subject:
    """What is measured, for `seconds` per figure.

    `dense` is the dense model in torch, whatever the engine.
    """

    dense: nn.Module
    evaluation: Evaluation
    engine: Engine
    floor: Floor
    seconds: float


def layer_rows(subject: Subject, tokens: Sequence[int], tick: Tick) -> list[dict[str, Any]]:
    """Each layer with each number of tokens, which it gets in the dense model."""
    rows, batches = [], subject.evaluation.batches
    for pair in subject.engine.pairs:
        x_TD = inputs_of(subject.dense, pair.spec, batches, max(tokens))
        for count in tokens:
            visited = pair.visited(x_TD[:count])
            found = interleaved(pair.calls(x_TD[:count]), seconds=subject.seconds)
            floors = subject.floor.of_layer(pair.spec, count, visited)
            row = {"path": pair.spec.ffn.path, "tokens": count, "visited_experts": visited}
            rows.append(row | compared(found, floors))
            tick()
    return rows


def reading_rows(subject: Subject, tokens: Sequence[int], tick: Tick) -> list[dict[str, Any]]:
    """The whole models on texts of each number of tokens; on one batch if they read no text."""
    rows: list[dict[str, Any]] = []
    for count in tokens:
        calls, read, logits = _reading(subject, count)
        floors: Mapping[str, float | None] = {"dense": None, "converted": None}
        if read is not None:
            floors = subject.floor.of_model(read, logits)
        found = interleaved(calls, seconds=subject.seconds)
        rows.append({"tokens": read} | compared(found, floors))
        tick()
        if read is None:
            break
    return rows


def _reading(subject: Subject, count: int) -> tuple[Calls, int | None, int]:
    """Calls that read; the number of tokens, None if they read no text; how many get logits."""
    ids_BL = text_of(subject.dense, subject.evaluation, count)
    if ids_BL is None:
        return subject.engine.read(subject.evaluation.batches[0]), None, 0
    calls = subject.engine.read({"input_ids": ids_BL})
    logits = len(ids_BL) if subject.engine.last_logits_only else ids_BL.numel()
    return calls, ids_BL.numel(), logits


def writing_row(subject: Subject, tick: Tick) -> dict[str, Any] | None:
    """One token after the other with a cache; None for a model that writes no text."""
    ids_1L, most = _prompt(subject)
    calls = None if ids_1L is None else subject.engine.write(ids_1L)
    if calls is None:
        return None
    found = interleaved(calls, seconds=subject.seconds, least=min(STEPS, most), most=most)
    tick()
    return {"tokens": 1} | compared(found, subject.floor.of_model(1, 1))


def _prompt(subject: Subject) -> tuple[torch.Tensor | None, int]:
    """What is read before the first token is written, and how many may be written after it."""
    half = longest(subject.dense) // 2
    ids_1L = text_of(subject.dense, subject.evaluation, min(PROMPT, half))
    most = min(MOST, half - 1)
    if ids_1L is None or most < 1:
        return None, 0
    return ids_1L, most


def six(
    subject: Subject, timed: Mapping[str, Any], size: Costs, report: Report, tick: Tick
) -> dict[str, dict[str, float | None]]:
    """EfficientLLM's metrics of each model writing text, or reading if it writes none.

    Seconds and tokens are those of `timed`, the row of what is written or else of the longest text
    that was read, in which both models took turns. Memory, load and power are those of each model
    in a process of its own. The perplexities are those in `report`.
    """
    engine, (ids_1L, most) = subject.engine, _prompt(subject)
    use: Any = engine.writer
    inputs: Any = ids_1L
    if use is None or ids_1L is None:
        ids_BL = text_of(subject.dense, subject.evaluation, timed["tokens"] or 1)
        use, most = engine.reader, MOST
        inputs = subject.evaluation.batches[0] if ids_BL is None else {"input_ids": ids_BL}
    sizes = {"dense": size.bytes_before, "converted": size.bytes_on_disk}
    found: dict[str, dict[str, float | None]] = {}
    for name, make in engine.makers.items():
        meters = measured_alone(Job(make, use, inputs, subject.seconds, most))
        quality = None
        if report.end_to_end and (text := report.end_to_end.language_model):
            perplexities = {"dense": text.dense_perplexity, "converted": text.converted_perplexity}
            quality = 1 / text.dense_perplexity, 1 / perplexities[name]
        found[name] = six_metrics(
            meters,
            timed[name]["median"],
            timed["tokens"],
            sizes=(size.bytes_before, sizes[name]),
            quality=quality,
        )
        tick()
    return found
