"""Example inputs for a model, guessed in a fixed order; and random ones of the same form.

Only shapes and dtypes matter for capture, and every guess is checked by a forward on fake tensors,
which costs no arithmetic. Models of transformers say a lot about what they read;
of any other module the layers do. Where a forward says what it misses, it gets it.
"""

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs, capture, check_runs
from upcycle.capture.function_caches import caches_cleared
from upcycle.capture.recorder import Program
from upcycle.capture.source_lines import words_of
from upcycle.capture.transformers_input_shapes import (
    BATCH,
    LENGTH,
    part_of,
    required,
    unknown_arguments,
    values_of,
)
from upcycle.errors import CaptureError, ValueNeededError
from upcycle.util.modules import model_dtype

# A model of transformers that refuses every combination is rarely served by its layers' widths.
_LAYER_GUESSES = 4
# Integers that are no tokens: what they may be depends on the model, and zeros are accepted.
_NO_TOKENS = re.compile(r"mask|bbox|box|type|position|shape|grid|thw|freq|static|lengths|num_")
_MAIN = ("input_ids", "pixel_values", "input_features", "input_values", "past_values")
_FORMS = 12  # of the required arguments together: some have several


def find_example(model: nn.Module, *, repeat_blocks: bool = True) -> tuple[ExampleInputs, Program]:
    """The first guess that `model` accepts, and what its forward did.

    Raises:
        CaptureError: no guess fits. The message names the arguments whose form is not known, or
            else the first failure; the model's own control flow comes before wrong inputs.
    """
    check_runs(model)
    failure: CaptureError | None = None
    seen: set[str] = set()
    for guess in _guesses(model):
        example: ExampleInputs | None = guess
        while example is not None and _form(example) not in seen:
            seen.add(_form(example))
            try:
                with caches_cleared(model):
                    return example, capture(model, example, repeat_blocks=repeat_blocks)
            except CaptureError as error:
                by_name = isinstance(example, Mapping) or not hasattr(model, "main_input_name")
                needed = by_name and isinstance(error, ValueNeededError)
                if failure is None or (needed and not isinstance(failure, ValueNeededError)):
                    failure = error
                example = _completed(model, example, error)
    if isinstance(failure, ValueNeededError):
        raise failure
    signature = inspect.signature(model.forward)
    unknown = unknown_arguments(getattr(model, "config", None), signature.parameters)
    if failure is None or (unknown and hasattr(model, "main_input_name")):
        named = ", ".join(unknown) or str(signature)
        raise CaptureError(
            f"{type(model).__name__}: no example could be guessed for the arguments of its "
            f"forward: {named}; give all its inputs with `example_inputs`, a function that "
            "returns a dict of them by name"
        ) from failure
    raise failure


def randomised(example: ExampleInputs, *, vocabulary: int, seed: int) -> ExampleInputs:
    """Inputs of the shapes of `example` with normal floats, tokens below `vocabulary`, and the same
    masks and other integers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: object, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or "mask" in str(name):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        if _NO_TOKENS.search(str(name)):
            return value
        return torch.randint(0, vocabulary, value.shape, generator=generator)

    if isinstance(example, Mapping):
        return {name: draw(name, value) for name, value in example.items()}
    return tuple(draw(i, value) for i, value in enumerate(example))


def _form(example: ExampleInputs) -> str:
    items = example.items() if isinstance(example, Mapping) else enumerate(example)
    return repr([(k, (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v) for k, v in items])


def _guesses(model: nn.Module) -> Iterator[ExampleInputs]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        yield from _from_layers(model)
        return
    yield from _combinations(model, config)
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except (AttributeError, KeyError, TypeError, ValueError):  # a property that computes
        dummy = None
    if isinstance(dummy, dict):
        yield dummy
    yield from itertools.islice(_from_layers(model), _LAYER_GUESSES)


def _combinations(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Arguments for a model of transformers by their usual forms, the likeliest first.

    The signature of the forward says which there are, and `main_input_name` which matters most.
    """
    parameters = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    if main not in parameters:
        main = next((name for name in _MAIN if name in parameters), next(iter(parameters), main))
    needed, dtype = set(required(parameters)), model_dtype(model)
    cache = {"use_cache": False} if "use_cache" in parameters else {}

    def forms(names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
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


def _completed(
    model: nn.Module, example: ExampleInputs, failure: CaptureError
) -> ExampleInputs | None:
    """`example` with the arguments that a failure speaks of, if their form is known.

    They are those that its message names; else those on the innermost line of the model's code
    that has any, as in ``pixels.view(len(image_grid))`` of an `image_grid` that is None.
    """
    config = getattr(model, "config", None)
    if config is None or not isinstance(example, Mapping):
        return None
    arguments = inspect.signature(model.forward).parameters
    message = str(failure)
    in_message = set(re.findall(r"\w+", message.lower()))
    for words in (in_message, *words_of(failure.__cause__ or failure)):
        more = {}
        for name in (n for n in arguments if n in words and n not in example):
            value = next(values_of(name, config, model_dtype(model), arguments), None)
            if value is not None and not (name.endswith("_embeds") and "input_ids" in example):
                more[name] = value
                if re.search(r"\b(either|one of)\b", message, re.IGNORECASE):
                    break  # one will do, two may be refused
        if more:
            return {**example, **more}
    return None


def _from_layers(model: nn.Module) -> Iterator[tuple[torch.Tensor, ...]]:
    """Any module: as many tensors as its forward requires, of the width that its layers want."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = max(sum(p.default is p.empty and p.kind in kinds for p in parameters), 1)
    dtype = model_dtype(model)
    for width, kind in _widths(model):
        if kind == "tokens":
            yield (torch.zeros(BATCH, LENGTH, dtype=torch.long),) * count
        elif kind == "channels":
            yield (torch.zeros(BATCH, width, 32, 32, dtype=dtype),) * count
            yield (torch.zeros(BATCH, width, 32, dtype=dtype),) * count
        else:
            yield (torch.zeros(BATCH, LENGTH, width, dtype=dtype),) * count
            yield (torch.zeros(BATCH, width, dtype=dtype),) * count


def _widths(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Input widths in the order of the layers, each once."""
    seen: set[tuple[int, str]] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found = (module.num_embeddings, "tokens")
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            found = (module.in_channels, "channels")
        elif isinstance(module, nn.MultiheadAttention):
            found = (module.embed_dim, "features")
        elif isinstance(module, nn.Linear):
            found = (module.in_features, "features")
        elif isinstance(module, nn.LayerNorm):
            found = (module.normalized_shape[-1], "features")
        else:
            continue
        if found not in seen:
            seen.add(found)
            yield found
    for parameter in (p for p in model.parameters() if p.dim() == 2):
        yield from ((width, "features") for width in parameter.shape)
