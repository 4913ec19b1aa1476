"""Trace a model on data."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.data.calibration import CalibrationData, calibration_data, called_data
from upcycle.data.calibration_files import HELD_OUT, CalibrationInput
from upcycle.data.default_data import RANDOM
from upcycle.data.verification_inputs import MIN_CHARACTERS, Evaluation, evaluation_for
from upcycle.errors import UsageError
from upcycle.passes.calibrate.sites import run_batch
from upcycle.recipe.reader import load_recipe
from upcycle.routing.trace import Trace, trace
from upcycle.targets.traced.arguments import apart
from upcycle.util.modules import eval_mode


@torch.no_grad()
def traced(
    model: nn.Module,
    given: CalibrationInput | None,
    *,
    directory: Path | None = None,
    tokens: int = 16384,
    length: int = 512,
    trust_remote_code: bool = False,
    done: Callable[[int, int], None] = lambda at, of: None,
) -> Trace:
    """The visits of the tokens of `given` to the experts of `model`.

    Args:
        model: with MoE layers.
        given: as `upcycle.data.calibration_files.read_calibration` reads it; its domains become the
            classes of the trace. None for the default text.
        directory: where the tokenizer is.
        tokens, length: at most so many, in sequences of that length.
        done: is told of each batch.

    Raises:
        UsageError: the data is too short, or not of the kind that the model reads.
    """
    data = batches_of(
        model,
        given,
        directory=directory,
        tokens=tokens,
        length=length,
        trust_remote_code=trust_remote_code,
        whole=True,
    )
    with eval_mode(model), trace(model) as seen:
        for at, batch in enumerate(data.batches):
            run_batch(model, batch)
            done(at + 1, len(data.batches))
    return replace(seen.result(), classes=_classes(given, data.domains), data=data.what)


def batches_of(
    model: nn.Module,
    given: CalibrationInput | None,
    *,
    directory: Path | None = None,
    tokens: int = 16384,
    length: int = 512,
    trust_remote_code: bool = False,
    whole: bool = False,
) -> CalibrationData:
    """Inputs of `model` out of what `given` holds, or out of the default text.

    Args:
        whole: all of it; else without the quarter that `held_out` gives.

    Raises:
        UsageError: the data is too short, or not of the kind that the model reads.
    """
    sizes = [f"calibration.tokens={tokens}", f"calibration.length={length}"]
    recipe = load_recipe("split-all", sizes)  # of which these two numbers are read
    with called_data():
        found = calibration_data(
            model,
            recipe,
            given,
            directory=directory,
            trust_remote_code=trust_remote_code,
            whole=whole,
        )
    return replace(found, what="random inputs") if found.what == RANDOM else found


def held_out(
    model: nn.Module,
    given: CalibrationInput,
    *,
    directory: Path | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Of what `given` holds the quarter that `batches_of` leaves out, to compare two models on.

    Fewer than four images, examples or batches serve both.

    Raises:
        UsageError: the data is too short, or not of the kind that the model reads.
    """
    held = given.parts()[0]
    if not held.texts:
        data = batches_of(
            model, held, directory=directory, trust_remote_code=trust_remote_code, whole=True
        )
        what = f"{given.what} (a quarter of four or more is held out)"
        return Evaluation([data.batches[0]], what=what)
    size, least = sum(map(len, given.texts)), HELD_OUT * MIN_CHARACTERS
    if size < least:
        raise UsageError(
            f"`data`: the text has {size} characters; give at least {least}, of which a quarter is "
            "held out to compare on"
        )
    with called_data():
        found = evaluation_for(
            model,
            directory=directory,
            trust_remote_code=trust_remote_code,
            text="\n\n".join(held.texts),
        )
    return replace(found, what=f"the quarter of {given.what} that was held out")


def named_classes(given: CalibrationInput | None, paths: Sequence[str]) -> CalibrationInput | None:
    """What several files gave, with their names for domains instead of numbers."""
    if given is None or len(paths) < 2:
        return given
    names = apart(Path(path).stem for path in paths)
    return replace(given, domains=tuple(names[int(domain)] for domain in given.domains))


def _classes(given: CalibrationInput | None, domains: Any) -> tuple[str, ...]:
    """The class of each sequence; none without domains."""
    if given is None or domains is None:
        return ()
    kinds: Sequence[str] = sorted(set(given.domains))
    return tuple(kinds[number] for number in torch.cat(list(domains)).tolist())
