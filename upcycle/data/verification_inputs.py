"""What a conversion is verified on: real text where there is a tokenizer, else random inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from upcycle.capture.capture import ExampleInputs
from upcycle.capture.guess_inputs import find_example, randomised
from upcycle.data.default_data import verification_text
from upcycle.data.text import (
    WINDOW,
    check_tokens,
    fixed_inputs,
    is_language_model,
    longest,
)
from upcycle.errors import UsageError
from upcycle.models.tokenizer import tokenizer_in
from upcycle.util.copies import buffers_restored, state_restored
from upcycle.util.modules import device_of, model_dtype
from upcycle.util.trees import attributes_of, results_in

MIN_CHARACTERS = 200
SENTENCES, SENTENCE_TOKENS = 16, 64
WINDOWS = 4
PROMPT_TOKENS, NEW_TOKENS = 8, 24


@dataclass
class Evaluation:
    """Inputs of a verification.

    Attributes:
        batches: compared output by output; small.
        windows: [n, 512] tokens of running text for perplexity, or None.
        what: where they come from, in a few words.
        prompts: [1, 8] tokens each, which a language model continues.
    """

    batches: list[ExampleInputs]
    windows: torch.Tensor | None = None
    what: str = "random inputs"
    prompts: list[torch.Tensor] = field(default_factory=list)


def evaluation_for(
    model: nn.Module,
    *,
    directory: Path | None = None,
    trust_remote_code: bool = False,
    example: ExampleInputs | None = None,
    text: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Choose inputs for `model`, which has weights.

    Args:
        directory: where its tokenizer is, if it has one.
        trust_remote_code: run code that the tokenizer brings.
        example: inputs given by the user, which are used as they are.
        text: what to tokenise; `verification_text` if None.
        seed: of random inputs.

    Raises:
        UsageError: a text was given and there is no tokenizer, or it is too short; or the tokenizer
            is not of this model.
    """
    if example is not None:
        return Evaluation([example], what="the given inputs")
    reads_text = getattr(model, "main_input_name", "") == "input_ids"
    tokenizer = tokenizer_in(directory if reads_text else None, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        if text is not None:
            raise UsageError(
                f"`calibration`: a text needs a tokenizer, and {directory or 'the model'} has none"
            )
        config = getattr(model, "config", None)
        vocabulary = min(getattr(config, "vocab_size", 2) or 2, 2**31)
        found = find_example(model)[0]
        batches = [randomised(found, vocabulary=vocabulary, seed=seed + i) for i in range(2)]
        return Evaluation([cast_floats(batch, model_dtype(model)) for batch in batches])
    what = "the given text"
    if text is None:
        what, text = "the documentation of Python", verification_text()
    if len(text.strip()) < MIN_CHARACTERS:
        raise UsageError(
            f"`calibration`: the text has {len(text.strip())} characters; give at least "
            f"{MIN_CHARACTERS}"
        )
    choose = _running_text if is_language_model(model) else _sentences
    return choose(model, tokenizer, text, what)


def _running_text(model: nn.Module, tokenizer: Any, text: str, what: str) -> Evaluation:
    window = min(WINDOW, longest(model))
    ids = tokenizer(text[: 16 * WINDOW * WINDOWS], return_tensors="pt", verbose=False).input_ids[0]
    check_tokens(model, ids)
    count = min(len(ids) // window, WINDOWS)
    windows = ids[: count * window].reshape(count, window) if count else None
    length = min(SENTENCE_TOKENS, len(ids) // 4, window)
    batch = ids[: 4 * length].reshape(4, length)
    batches: list[ExampleInputs] = [
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **fixed_inputs(model)}
        for tokens in (batch, ids[None, :1])
    ]
    prompts = [batch[i : i + 1, :PROMPT_TOKENS] for i in range(2)]
    return Evaluation(batches, windows, what, prompts)


def _sentences(model: nn.Module, tokenizer: Any, text: str, what: str) -> Evaluation:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if len(line.split()) > 3] or lines
    encoded = tokenizer(
        lines[:: max(len(lines) // SENTENCES, 1)][:SENTENCES],
        padding=tokenizer.pad_token is not None,
        truncation=True,
        max_length=min(SENTENCE_TOKENS, longest(model)),
        return_tensors="pt" if tokenizer.pad_token is not None else None,
    )
    if tokenizer.pad_token is None:  # then one sentence, which needs no padding
        encoded = {name: torch.tensor(rows[:1]) for name, rows in encoded.items()}
    check_tokens(model, encoded["input_ids"])
    extra = fixed_inputs(model)
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    single = {name: tensor[:1, :1] for name, tensor in batch.items()}
    rows = len(batch["input_ids"])
    many = pytree.tree_map_only(torch.Tensor, lambda t: t.expand(rows, -1), extra)
    return Evaluation([{**batch, **many}, {**single, **extra}], what=what)


def outputs_of(model: nn.Module, inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    """Every float tensor that `model` returns, by name, as `comparable` gives them.

    A forward that draws random numbers, as ViLT's choice of patches, draws the same ones each time.
    What it writes into its inputs, its buffers and its attributes does not stay.
    """
    here = device_of(model)
    given = pytree.tree_map_only(torch.Tensor, lambda t: t.to(here, copy=True), inputs)
    with (
        buffers_restored(model),
        state_restored(model),
        torch.no_grad(),
        torch.random.fork_rng([] if here.type == "cpu" else [here]),
    ):
        torch.manual_seed(0)
        out = model(**given) if isinstance(given, Mapping) else model(*given)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in _named(out).items():
        if isinstance(value, Cache) or name == "past_key_values":  # a model's own may be tuples
            continue
        leaves = [t for t in results_in(value) if t.is_floating_point() and t.numel()]
        for i, tensor in enumerate(leaves):
            tensors[name if len(leaves) == 1 else f"{name}.{i}"] = tensor
    return comparable(tensors, inputs)


def _named(out: Any) -> Mapping[str, Any]:
    """What a model returned, by name: of an object of any class by its attributes."""
    if isinstance(out, Mapping):
        return out
    leaves = pytree.tree_leaves(out)
    unknown = len(leaves) == 1 and leaves[0] is out and not isinstance(out, torch.Tensor)
    return (unknown and attributes_of(out)) or {"output": out}


def comparable(
    tensors: Mapping[str, torch.Tensor], inputs: ExampleInputs
) -> dict[str, torch.Tensor]:
    """Outputs without padding, where nothing is promised.

    A batch of token features with an attention mask also gives `sentence_embedding`: the mean over
    the tokens, of length one.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or not tensors:
        return dict(tensors)
    mask = mask.to(next(iter(tensors.values())).device)
    found = {n: t[mask.bool()] if t.shape[:2] == mask.shape else t for n, t in tensors.items()}
    if "last_hidden_state" in tensors:
        hidden = tensors["last_hidden_state"]
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        found["sentence_embedding"] = torch.nn.functional.normalize(mean, dim=-1)
    return found


def cast_floats(inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    """The inputs with their floats in `dtype`."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    made: ExampleInputs = pytree.tree_map_only(torch.Tensor, cast, inputs)
    return made
