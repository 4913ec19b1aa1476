"""Whole models in torch: reading a text, and writing one token after the other.

Shape suffixes: B batch, L tokens of a text.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from upcycle.capture.capture import ExampleInputs
from upcycle.data.text import is_language_model, longest
from upcycle.data.verification_inputs import Evaluation
from upcycle.targets.traced.cache import cache_argument, cache_in

PROMPT = 32  # tokens that are read before the first is written
Call = Callable[[], object]


def text_of(model: nn.Module, evaluation: Evaluation, tokens: int) -> torch.Tensor | None:
    """Ids [B, L] of `tokens` tokens in as few texts as possible; None if `model` reads no text."""
    batch = evaluation.batches[0]
    if not isinstance(batch, Mapping):
        return None
    tensors = {name for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if "input_ids" not in tensors or not tensors <= {"input_ids", "attention_mask"}:
        return None
    ids = batch["input_ids"] if evaluation.windows is None else evaluation.windows
    text = ids.flatten().repeat(-(-tokens // ids.numel()))
    length = min(tokens, longest(model))
    return text[: tokens // length * length].reshape(-1, length)


def reader(model: nn.Module, inputs: ExampleInputs) -> Call:
    """A function that runs `model` on `inputs`; a language model as `generate` reads a prompt."""
    if not isinstance(inputs, Mapping):
        return lambda: model(*inputs)
    given: dict[str, Any] = dict(inputs)
    if is_language_model(model):
        given["use_cache"] = True
        if only_last(model):
            given["logits_to_keep"] = 1
    return lambda: model(**given)


def only_last(model: nn.Module) -> bool:
    """Whether `model` can leave out the logits of all tokens but the last."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def writer(model: Any, ids_BL: torch.Tensor) -> Call:
    """A function that writes the next token of the texts, each time the one after."""
    out = model(input_ids=ids_BL, use_cache=True)
    argument = cache_argument(model)
    assert argument is not None

    def step() -> None:
        nonlocal out
        past = {argument: cache_in(out)}
        out = model(input_ids=out.logits[:, -1:].argmax(-1), use_cache=True, **past)

    return step
