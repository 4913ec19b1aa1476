"""What a conversion is verified on: batches of real text where there is a tokenizer, else random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import AutoTokenizer, PreTrainedModel

from upcycle import samples
from upcycle.capture import ExampleInputs
from upcycle.errors import UsageError
from upcycle.inputs import find_example, randomised

SENTENCES, SENTENCE_TOKENS = 16, 64
WINDOW, WINDOWS = 512, 4
PROMPT_TOKENS, NEW_TOKENS = 8, 24


@dataclass
class Evaluation:
    """Inputs of a verification.

    Attributes:
        batches: compared output by output; small.
        windows: [n, 512] tokens of running text for perplexity, or None.
        what: where they come from, in a few words.
    """

    batches: list[ExampleInputs]
    windows: torch.Tensor | None = None
    what: str = "random inputs"
    prompts: list[torch.Tensor] = field(default_factory=list)


def evaluation_for(
    model: nn.Module,
    *,
    directory: Path | None = None,
    example: ExampleInputs | None = None,
    text: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Choose inputs for `model`.

    Args:
        model: the dense model, with weights.
        directory: where its tokenizer is, if it has one.
        example: inputs given by the user, which are used as they are.
        text: what to tokenise; the standard library's documentation if None.
        seed: of random inputs.

    Raises:
        UsageError: a text was given and there is no tokenizer, or it is too short.
    """
    if example is not None:
        return Evaluation([example], what="the given inputs")
    tokenizer = (
        _tokenizer(directory) if getattr(model, "main_input_name", "") == "input_ids" else None
    )
    if tokenizer is None:
        if text is not None:
            raise UsageError(
                f"--calibration: a text needs a tokenizer, and {directory or 'the model'} has none"
            )
        config = getattr(model, "config", None)
        vocabulary = min(getattr(config, "vocab_size", 2) or 2, 2**31)
        found = find_example(model)[0]
        return Evaluation(
            [randomised(found, vocabulary=vocabulary, seed=seed + i) for i in range(2)]
        )
    source = "the given text" if text is not None else "the documentation of Python"
    text = text if text is not None else samples.default_text()
    if len(text.split()) < 32:
        raise UsageError("--calibration: the text is shorter than 32 words; give a longer one")
    extra = _decoder_inputs(model)
    if is_language_model(model):
        ids = tokenizer(text[: 16 * WINDOW * WINDOWS], return_tensors="pt").input_ids[0]
        count = min(len(ids) // WINDOW, WINDOWS)
        windows = ids[: count * WINDOW].reshape(count, WINDOW) if count else None
        length = min(SENTENCE_TOKENS, len(ids) // 4)
        batch = ids[: 4 * length].reshape(4, length)
        return Evaluation(
            [{"input_ids": batch, **extra}, {"input_ids": ids[None, :1], **extra}],
            windows=windows,
            what=source,
            prompts=[batch[i : i + 1, :PROMPT_TOKENS] for i in range(2)],
        )
    lines = [line.strip() for line in text.splitlines() if len(line.split()) > 3]
    step = max(len(lines) // SENTENCES, 1)
    encoded = tokenizer(
        lines[::step][:SENTENCES],
        padding=True,
        truncation=True,
        max_length=SENTENCE_TOKENS,
        return_tensors="pt",
    )
    batch_of_text = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    single = {name: tensor[:1, :1] for name, tensor in batch_of_text.items()}
    return Evaluation([{**batch_of_text, **extra}, {**single, **extra}], what=source)


def is_language_model(model: nn.Module) -> bool:
    """Whether its logits predict the next token of its input."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    return not model.config.is_encoder_decoder and model.main_input_name == "input_ids"


def outputs_of(model: nn.Module, inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    """Every float tensor that `model` returns, by name, as `comparable` gives them."""
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    named = dict(out) if isinstance(out, Mapping) else {"output": out}
    named.pop("past_key_values", None)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in named.items():
        leaves = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        for i, tensor in enumerate(t for t in leaves if t.is_floating_point()):
            tensors[name if len(leaves) == 1 else f"{name}.{i}"] = tensor
    return comparable(tensors, inputs)


def comparable(
    tensors: Mapping[str, torch.Tensor], inputs: ExampleInputs
) -> dict[str, torch.Tensor]:
    """Outputs without padding, where nothing is promised.

    A batch of token features with an attention mask also gives `sentence_embedding`: the mean over
    the tokens, of length one.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        return dict(tensors)
    kept = {n: t[mask.bool()] if t.shape[:2] == mask.shape else t for n, t in tensors.items()}
    if "last_hidden_state" in tensors:
        hidden = tensors["last_hidden_state"]
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        kept["sentence_embedding"] = torch.nn.functional.normalize(mean, dim=-1)
    return kept


def _decoder_inputs(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    extra: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id or 0
        extra["decoder_input_ids"] = torch.full((1, 4), start)
    if getattr(config, "use_cache", None) is not None:
        extra["use_cache"] = False
    return extra


def _tokenizer(directory: Path | None) -> Any:
    names: Sequence[str] = ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json")
    if directory is None or not any((directory / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise UsageError(f"{directory}: its tokenizer cannot be loaded: {error}") from error
