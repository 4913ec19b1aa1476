"""Tier T4 of verification: programs of `torch.export`, loaded and run, against the model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from upcycle.data.verification_inputs import Evaluation, cast_floats
from upcycle.ir.measured import Check
from upcycle.ir.rounding import ROUNDING
from upcycle.models.program_file import open_program
from upcycle.targets.pt2.write import SUFFIX
from upcycle.targets.traced.arguments import arguments_of, identifiers
from upcycle.targets.traced.cache import PAST, PRESENT, without_cache
from upcycle.targets.traced.experts import Form, experts_as
from upcycle.targets.traced.outputs import named_tensors
from upcycle.targets.traced.parts import Part, parts
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.verification.checks import PROGRAM, check
from upcycle.verification.metrics import check_outputs, distance


def verify_programs(
    directory: Path, model: nn.Module, evaluation: Evaluation, form: Form, *, cache: bool
) -> list[Check]:
    """Each file that `write_programs` wrote of `model`, on the evaluation's batches.

    The layers of the model run in the same form, so that what is left is rounding. With a cache a
    text is read without a past, and then one more token with it.

    Raises:
        VerificationError: a program has other outputs than the model.
    """
    worst = 0.0
    with torch.no_grad(), without_cache(model), eval_mode(model), experts_as(model, form):
        batches = [cast_floats(batch, model_dtype(model)) for batch in evaluation.batches]
        given = [arguments_of(model, batch) for batch in batches]
        for part in parts(model, given[0], cache=cache):
            path = directory / f"{part.stem}{SUFFIX}"
            program = open_program(path).module()
            for one in given:
                for feeds, theirs in _runs(model, part, one.tensors):
                    words = identifiers(list(feeds))
                    ours = program(**dict(zip(words, feeds.values(), strict=True)))
                    check_outputs(ours, theirs, f"the program {path.name}")
                    floats = [n for n, t in theirs.items() if t.is_floating_point() and t.numel()]
                    worst = max(worst, *(distance(ours[n], theirs[n]).relative for n in floats))
    return [check(PROGRAM, worst, ROUNDING[model_dtype(model)])]


def form_of(path: Path) -> Form:
    """The form of the layers in a program.

    Raises:
        UsageError: the file is damaged, or has something in it that could run.
    """
    nodes = open_program(path).graph.nodes
    is_fused = any(node.target is torch.ops.upcycle.moe.default for node in nodes)
    return "fused" if is_fused else "portable"


def _runs(
    model: nn.Module, part: Part, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs of a program, and what the model gives for them."""
    feeds = _feeds(part, tensors)
    made = named_tensors(part.compute(model.forward, feeds))
    yield feeds, made
    if not any(name.replace(PAST, PRESENT) in made for name in feeds if name.startswith(PAST)):
        return
    length = feeds["input_ids"].shape[1]
    after = {name: _after(name, tensor, made, length) for name, tensor in feeds.items()}
    yield after, named_tensors(part.compute(model.forward, after))


def _feeds(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a program for those of the model; a past is empty, and what else it lacks is
    random."""
    if not any(name.startswith(PAST) for name in part.example):
        return {name: tensors.get(name, example) for name, example in part.example.items()}
    ids = tensors.get("decoder_input_ids", tensors.get("input_ids", part.example["input_ids"]))
    batch, length = ids.shape
    generator = torch.Generator().manual_seed(0)
    feeds = {}
    for name, example in part.example.items():
        axes = (part.axes or {}).get(name, {})
        sizes = [batch if axes.get(i) == "batch" else n for i, n in enumerate(example.shape)]
        sizes = [0 if axes.get(i) == "past" else n for i, n in enumerate(sizes)]
        if name == "input_ids":
            feeds[name] = ids
        elif name == "position_ids":
            feeds[name] = torch.arange(length).expand(batch, length)
        elif name == "attention_mask":
            feeds[name] = torch.ones(batch, length, dtype=example.dtype)
        elif example.is_floating_point():
            feeds[name] = torch.randn(sizes, generator=generator).to(example.dtype)
        else:
            feeds[name] = torch.ones(sizes, dtype=example.dtype)
    return feeds


def _after(name: str, tensor: Tensor, made: Mapping[str, Tensor], length: int) -> Tensor:
    """The input for one more token, after `length` tokens."""
    if name == "input_ids":
        return tensor[:, -1:]
    if name == "position_ids":
        return torch.full_like(tensor[:, -1:], length)
    if name == "attention_mask":
        return torch.cat([tensor, tensor[:, -1:]], 1)
    return made.get(name.replace(PAST, PRESENT), tensor)
