"""Example inputs for a model, guessed in a fixed order; and random ones of the same form.

Only shapes and dtypes matter for capture, and every guess is checked by a forward on fake tensors,
which costs no arithmetic.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from upcycle.capture import ExampleInputs, capture
from upcycle.errors import CaptureError
from upcycle.recorder import Program

# Sizes that differ from each other, so that a mix-up of axes shows.
BATCH, LENGTH, DECODER_LENGTH = 2, 7, 5


def find_example(model: nn.Module, *, repeat_blocks: bool = True) -> tuple[ExampleInputs, Program]:
    """The first guess that `model` accepts, and what its forward did.

    Raises:
        CaptureError: no guess fits; the message names the last failure.
    """
    failure: CaptureError | None = None
    for example in _guesses(model):
        try:
            return example, capture(model, example, repeat_blocks=repeat_blocks)
        except CaptureError as error:
            failure = failure or error
    name = type(model).__name__
    raise failure or CaptureError(
        f"{name}: no example input could be guessed from its forward "
        f"{inspect.signature(model.forward)}; give one with --inputs module:callable"
    )


def randomised(example: ExampleInputs, *, vocabulary: int, seed: int) -> ExampleInputs:
    """Inputs of the shapes of `example` with random content: normal floats, tokens, the same masks.

    Args:
        example: as `find_example` returns it.
        vocabulary: exclusive upper bound of random integers.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: object, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.dtype == torch.bool or "mask" in str(name):
            return value
        return torch.randint(0, vocabulary, value.shape, generator=generator)

    if isinstance(example, Mapping):
        return {name: draw(name, value) for name, value in example.items()}
    return tuple(draw(i, value) for i, value in enumerate(example))


def _guesses(model: nn.Module) -> Iterator[ExampleInputs]:
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        yield from _from_config(model, config)
        dummy = getattr(model, "dummy_inputs", None)
        if isinstance(dummy, dict):
            yield dummy
    yield from _from_layers(model)


def _from_config(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Transformers models say what they read in `main_input_name` and in their configuration."""
    main = str(model.main_input_name)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    mels = getattr(config, "num_mel_bins", 80)
    frames = 2 * getattr(config, "max_source_positions", 1500)
    dtype = _float_dtype(model)
    known = {
        "input_ids": tokens,
        "pixel_values": torch.zeros(BATCH, channels, height, width, dtype=dtype),
        "input_features": torch.zeros(BATCH, mels, frames, dtype=dtype),
        "input_values": torch.zeros(BATCH, 16000, dtype=dtype),
    }
    if main not in known:
        return
    parameters = inspect.signature(model.forward).parameters
    example: dict[str, Any] = {main: known[main]}
    if "pixel_values" in parameters and main == "input_ids" and hasattr(config, "vision_config"):
        example["pixel_values"] = known["pixel_values"]
    if "use_cache" in parameters:
        example["use_cache"] = False
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        decoder = torch.zeros(BATCH, DECODER_LENGTH, dtype=torch.long)
        yield {**example, "decoder_input_ids": decoder}
    yield example


def _from_layers(model: nn.Module) -> Iterator[tuple[torch.Tensor, ...]]:
    """Any module: as many tensors as its forward requires, of the width that its layers want."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )
    count = max(required, 1)
    dtype = _float_dtype(model)
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
    for parameter in model.parameters():
        if parameter.dim() == 2:
            yield (parameter.shape[0], "features")
            yield (parameter.shape[1], "features")


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
