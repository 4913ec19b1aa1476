"""The data that methods which look at activations are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from upcycle import recipe, samples
from upcycle.capture import ExampleInputs
from upcycle.errors import UsageError
from upcycle.evaluation import evaluation_for
from upcycle.text_inputs import check_tokens, fixed_inputs, is_language_model, longest, tokenizer_in

HELD_OUT = 1 / 4  # of the default text: verification reads it, calibration must not
SEQUENCES = 4  # in one batch
SENTENCE = 64  # tokens


@dataclass
class CalibrationData:
    """Batches of inputs, and where they come from, in a few words."""

    batches: Sequence[ExampleInputs]
    what: str


def calibration_data(
    model: nn.Module,
    wanted: recipe.Calibration,
    *,
    directory: Path | None = None,
    text: str | None = None,
) -> CalibrationData:
    """Inputs for `model`: running text for a language model, sentences for other text models.

    Args:
        model: the dense model.
        wanted: how many tokens, in sequences of what length.
        directory: where its tokenizer is, if it has one.
        text: what to tokenise; the last three quarters of the standard library's documentation if
            None, as verification reads the rest.

    Raises:
        UsageError: the text is too short, or there is no tokenizer for it.
    """
    is_text = getattr(model, "main_input_name", "") == "input_ids"
    tokenizer = tokenizer_in(directory) if is_text else None
    if tokenizer is None:
        if text is not None:
            raise UsageError(
                f"--calibration: a text needs a tokenizer, and {directory or 'the model'} has none"
            )
        return CalibrationData(evaluation_for(model, seed=1000).batches, "random inputs")
    what = "the given text" if text is not None else "the documentation of Python"
    if text is None:
        text = samples.default_text()
        text = text[int(len(text) * HELD_OUT) :]
    length = min(wanted.length if is_language_model(model) else SENTENCE, longest(model))
    ids_L = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    check_tokens(model, ids_L)
    count = min(len(ids_L), max(wanted.tokens, length)) // length
    if not count:
        raise UsageError(f"--calibration: the text has {len(ids_L)} tokens; give {length} or more")
    ids_NL = ids_L[: count * length].reshape(count, length)
    extra = fixed_inputs(model)
    batches = [
        {"input_ids": some, "attention_mask": torch.ones_like(some), **extra}
        for some in torch.split(ids_NL, SEQUENCES)
    ]
    return CalibrationData(batches, what)
