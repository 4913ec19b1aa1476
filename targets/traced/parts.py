"""The graphs of a model: one, or those that generate text with a cache. Each is a file.

- A causal language model is ``model``: new tokens and the past go in, logits and the longer
  past come out. With an empty past it reads the prompt.
- An encoder-decoder that generates is ``encoder_model``, which also makes the keys and values
  that the decoder looks at, and ``decoder_with_past_model``, which reads those and its past.
- Any other model is ``model`` with the inputs of its forward.

A model that has a cache in torch and none in its files would generate slowly and say nothing: it is
refused, unless the recipe asks for such a file (``onnx.cache: false``).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from upcycle.errors import UnsupportedError
from upcycle.targets.traced.arguments import Arguments
from upcycle.targets.traced.axes import Axes
from upcycle.targets.traced.cache import (
    CacheShape,
    cache_argument,
    cache_in,
    filled,
    shape_of,
    tensors_of,
)

MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_with_past_model"

# The model's own forward and the inputs by name -> the outputs, whose tensors have names.
Compute = Callable[[Callable[..., Any], dict[str, Tensor]], Any]
_TEXT = {"input_ids", "attention_mask", "position_ids"}
# Sizes of the example, all distinct; only their number of axes matters.
_BATCH, _NEW, _PAST, _ENCODED = 2, 3, 5, 7
_TEXT_AXES = {0: "batch", 1: "sequence"}
_MASK_AXES = {0: "batch", 1: "past + sequence"}
_PAST_AXES = {0: "batch", 2: "past"}
_ENCODED_AXES = {0: "batch", 2: "encoded"}


@dataclass(frozen=True)
class Part:
    """One graph of a model, and an `example` of what it reads.

    Attributes:
        stem: the name of its file, without the suffix.
        axes: names of the axes that must vary, by input; None lets the exporter decide.
        compute: what it computes.
    """

    stem: str
    example: Mapping[str, Tensor]
    axes: Axes | None
    compute: Compute


def parts(model: nn.Module, given: Arguments, *, cache: bool = True) -> list[Part]:
    """The graphs of `model`, which is on the CPU and runs once, on one token.

    With `cache` a model that has a cache keeps it.

    Raises:
        UnsupportedError: it has a cache that no file can hand on.
    """
    if not cache or not _generates_with_cache(model):
        return [Part(MODEL, given.tensors, None, given.call)]
    try:
        if given.chosen:
            raise UnsupportedError(f"it also reads {', '.join(given.chosen)}")
        if model.config.is_encoder_decoder:
            return _encoder_decoder(model, given.tensors)
        return [_causal(model, given.tensors)]
    except UnsupportedError as error:
        raise UnsupportedError(
            f"the file would have no key-value cache and generate slowly: {error}; "
            "onnx.cache=false in the recipe writes it without one"
        ) from error


def _generates_with_cache(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    return "use_cache" in inspect.signature(model.forward).parameters


def _causal(model: PreTrainedModel, example: Mapping[str, Tensor]) -> Part:
    argument = cache_argument(model)
    if more := set(example) - _TEXT:
        raise UnsupportedError(f"it also reads {', '.join(sorted(more))}")
    shape = shape_of(_cache_of(model, {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}))
    tokens = torch.zeros(_BATCH, _NEW, dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": tokens.new_ones(_BATCH, _PAST + _NEW)}
    axes: dict[str, dict[int, str]] = {"input_ids": _TEXT_AXES, "attention_mask": _MASK_AXES}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW)
        axes["position_ids"] = _TEXT_AXES

    def compute(forward: Callable[..., Any], given: dict[str, Tensor]) -> Mapping[str, Any]:
        text = {name: given[name] for name in inputs}
        past = {argument: filled(shape, given)}
        out = forward(**text, **past, use_cache=True)
        return {"logits": out.logits, **tensors_of(shape, cache_in(out))}

    past = shape.zeros(_BATCH, _PAST)
    axes |= dict.fromkeys(past, _PAST_AXES)
    return Part(MODEL, {**inputs, **past}, axes, compute)


def _encoder_decoder(model: PreTrainedModel, example: Mapping[str, Tensor]) -> list[Part]:
    main = model.main_input_name
    given = {n: t for n, t in example.items() if not n.startswith("decoder_")}
    if more := set(given) - {main, "attention_mask"}:
        raise UnsupportedError(f"it also reads {', '.join(sorted(more))}")
    start = torch.zeros(1, 1, dtype=torch.int64)
    cache = _two_caches(_cache_of(model, {main: given[main][:1], "decoder_input_ids": start}))
    crossed = shape_of(cache.cross_attention_cache, ".encoder")
    if main == "input_ids":
        given.setdefault("attention_mask", torch.ones_like(given[main]))
    else:
        given.pop("attention_mask", None)  # of frames: models of this kind read whole windows

    def encode(forward: Callable[..., Any], given: dict[str, Tensor]) -> Mapping[str, Any]:
        first = torch.zeros(given[main].shape[0], 1, dtype=torch.int64)
        out = forward(**given, decoder_input_ids=first, use_cache=True)
        made = tensors_of(crossed, _two_caches(cache_in(out)).cross_attention_cache)
        return {"last_hidden_state": out.encoder_last_hidden_state, **made}

    own = shape_of(cache.self_attention_cache, ".decoder")
    return [Part(ENCODER, given, None, encode), _decoder(model, own, crossed, main == "input_ids")]


def _decoder(model: PreTrainedModel, own: CacheShape, crossed: CacheShape, has_mask: bool) -> Part:
    inputs = {"input_ids": torch.zeros(_BATCH, _NEW, dtype=torch.int64)}
    axes: dict[str, dict[int, str]] = {"input_ids": _TEXT_AXES}
    if has_mask:
        inputs["encoder_attention_mask"] = torch.ones(_BATCH, _ENCODED, dtype=torch.int64)
        axes["encoder_attention_mask"] = {0: "batch", 1: "encoded"}
    past, encoded = own.zeros(_BATCH, _PAST), crossed.zeros(_BATCH, _ENCODED)
    axes |= dict.fromkeys(past, _PAST_AXES) | dict.fromkeys(encoded, _ENCODED_AXES)
    width = model.config.hidden_size
    argument = cache_argument(model)

    def decode(forward: Callable[..., Any], given: dict[str, Tensor]) -> Mapping[str, Any]:
        cache = {argument: EncoderDecoderCache(filled(own, given), filled(crossed, given))}
        keys = given[next(iter(encoded))]
        # Keys and values are all that the decoder needs of the encoder; of this only the shape.
        hidden = keys.new_zeros(keys.shape[0], keys.shape[2], width)
        mask = {"attention_mask": given["encoder_attention_mask"]} if has_mask else {}
        out = forward(
            decoder_input_ids=given["input_ids"],
            encoder_outputs=(hidden,),
            use_cache=True,
            **cache,
            **mask,
        )
        longer = _two_caches(cache_in(out)).self_attention_cache
        return {"logits": out.logits, **tensors_of(own, longer)}

    return Part(DECODER, {**inputs, **past, **encoded}, axes, decode)


def _cache_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> object:
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    return cache_in(out)


def _two_caches(cache: object) -> EncoderDecoderCache:
    if not isinstance(cache, EncoderDecoderCache):
        raise UnsupportedError(f"it returns {type(cache).__name__} where its cache should be")
    return cache
