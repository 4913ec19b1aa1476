"""What a model of transformers reads: arguments by the name and size its configuration gives.

The forward's signature says which arguments there are and `main_input_name` which one matters most;
`upcycle.capture.transformers_input_shapes` has their usual forms. Each is offered in turn.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from upcycle.capture.transformers_input_shapes import Example, part_of, required, values_of

_MAIN = ("input_ids", "pixel_values", "input_features", "input_values", "past_values")
_FORMS = 12  # of the required arguments together: some have several


def combinations(model: nn.Module, config: Any, dtype: torch.dtype) -> Iterator[Example]:
    """Arguments for the forward of `model`, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    if main not in parameters:
        main = next((name for name in _MAIN if name in parameters), next(iter(parameters), main))
    needed = set(required(parameters))
    cache = {"use_cache": False} if "use_cache" in parameters else {}

    def forms(names: tuple[str, ...]) -> Iterator[Example]:
        offers = (values_of(name, config, dtype, parameters) for name in names)
        return (dict(zip(names, values, strict=True)) for values in itertools.product(*offers))

    for extra in _companions(main, set(parameters) - needed, config):
        for base in itertools.islice(forms(tuple(sorted(needed - {main}))), _FORMS):
            for given in forms((main, *extra)):
                yield {**given, **base, **cache}


def _companions(main: str, optional: set[str], config: Any) -> Iterator[tuple[str, ...]]:
    """Sets of further arguments, each worth a try."""
    paired = bool(getattr(config, "is_encoder_decoder", False))
    if main == "input_ids" and "pixel_values" in optional and part_of(config, "vision"):
        yield ("pixel_values",)  # two towers; a language model that sees wants tokens for images
    if main == "past_values":
        names = ("past_time_features", "past_observed_mask", "future_values")
        yield tuple(n for n in (*names, "future_time_features") if n in optional) if paired else ()
    if paired and "decoder_input_ids" in optional:
        yield ("decoder_input_ids",)
    yield ()
    if paired and "decoder_input_values" in optional:
        yield ("decoder_input_values",)
    if f"{main}_mask" in optional:
        yield (f"{main}_mask",)
    for name in ("pixel_values", "input_features", "input_values", "bbox"):
        if name in optional and name != main:
            yield (name, "is_longer") if "is_longer" in optional else (name,)
