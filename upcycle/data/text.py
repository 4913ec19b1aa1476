"""Text as the inputs of a model."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.errors import UsageError

WINDOW = 512
SEQUENCE = 64  # tokens of a sentence, for a model that reads sentences
CHARACTERS = 8  # of a token: most have fewer
BESIDE_A_CUT = 16  # tokens, or sequences of them
T = TypeVar("T")


def longest(model: nn.Module) -> int:
    """Tokens that the model has positions for, as far as its configuration says."""
    config: Any = getattr(model, "config", None)
    named = (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions"))
    return min((n for n in named if isinstance(n, int) and n > 0), default=WINDOW)


def check_tokens(model: nn.Module, ids: torch.Tensor) -> None:
    """Raise UsageError unless all tokens are in the vocabulary of the model."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and ids.numel() and int(ids.max()) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives token {int(ids.max())} and the model has {vocabulary}; is it the "
            "tokenizer of another model?"
        )


def is_language_model(model: nn.Module) -> bool:
    """Whether its logits predict the next token of its input."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    return not model.config.is_encoder_decoder and model.main_input_name == "input_ids"


def fixed_inputs(model: nn.Module) -> dict[str, Any]:
    """The arguments besides the text that a model wants: no cache, the start of a decoder."""
    config: Any = getattr(model, "config", None)
    extra: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id or 0
        extra["decoder_input_ids"] = torch.full((1, 4), start)
    if getattr(config, "use_cache", None) is not None:
        extra["use_cache"] = False
    return extra


def decoder_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with all that the model wants: no cache, and a decoder that reads half of each text.

    A text for the decoder is shorter than the one for the encoder, so that their tokens cannot be
    confused.
    """
    batch = {**fixed_inputs(model), **batch}
    if "decoder_input_ids" in batch:
        ids_BL = batch["input_ids"]
        start_B1 = torch.full_like(ids_BL[:, :1], int(batch["decoder_input_ids"][0, 0]))
        batch["decoder_input_ids"] = torch.cat([start_B1, ids_BL[:, : ids_BL.shape[1] // 2]], 1)
        if batch["decoder_input_ids"].shape == ids_BL.shape:  # very short ones
            batch["decoder_input_ids"] = start_B1
    return batch


def sequences(
    tokenizer: Any, texts: Sequence[str], length: int, *, most: int, is_running: bool
) -> list[list[int]]:
    """Tokens of `texts` in sequences of `length`; at most `most` tokens, but one sequence at least.

    Running text is one long sequence that is cut. Sentences have the special tokens of the model at
    their ends, and the last of a text is shorter where the tokenizer can pad.
    """
    if is_running:
        wanted = max(most, length)

        def tokens_of(text: str) -> list[int]:
            found: list[int] = tokenizer(text, verbose=False).input_ids
            return found

        ids = _first(tokens_of, texts, wanted, CHARACTERS)
        count = min(len(ids), wanted) // length
        return [ids[i * length : (i + 1) * length] for i in range(count)]
    has_padding = tokenizer.pad_token is not None
    special = tokenizer.num_special_tokens_to_add()

    def rows_of(text: str) -> list[list[int]]:
        cut = tokenizer(
            [text], truncation=True, max_length=length, return_overflowing_tokens=True
        ).input_ids
        return [row for row in cut if (len(row) > special if has_padding else len(row) == length)]

    return _first(rows_of, texts, max(1, most // length), CHARACTERS * length)


def _first(
    parts_of: Callable[[str], list[T]], texts: Sequence[str], count: int, characters: int
) -> list[T]:
    """The first `count` parts of `texts`, or all: of a long text only as much is read as it takes.

    `characters` are those of a part, at most, as a first guess. The parts beside a cut differ from
    those of the whole text, and are left out.
    """
    found: list[T] = []
    for text in texts:
        missing = count - len(found)
        size = characters * (missing + BESIDE_A_CUT)
        parts = parts_of(text[:size])
        while len(parts) < missing + BESIDE_A_CUT and size < len(text):
            size *= 2
            parts = parts_of(text[:size])
        found += parts[:missing]
        if len(found) == count:
            break
    return found
