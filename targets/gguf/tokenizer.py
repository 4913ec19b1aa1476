"""The tokenizer of a model in its GGUF file: tokens, merges or scores, special ids, chat template.

Two kinds of BPE: over bytes (GPT-2, Llama 3, Qwen), and of SentencePiece with a byte for what has
no token (Llama 2, Mixtral), which llama.cpp merges by the scores of tokens.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, TokenType

from upcycle.errors import UnsupportedError
from upcycle.targets.gguf.pre_tokenizer import pre_tokenizer_name, steps_of

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write a tokenizer of transformers for a model with `vocab_size` rows of embeddings.

    Raises:
        UnsupportedError: llama.cpp would cut a text otherwise, or the model lacks tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = {} if backend is None else json.loads(backend.to_str())
    kind = data.get("model", {}).get("type", type(tokenizer).__name__)
    if kind != "BPE":
        raise UnsupportedError(f"gguf: tokenizers of the kind BPE are written, and this is {kind}")
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(tokens) >= vocab_size:
        raise UnsupportedError(
            f"gguf: the tokenizer has the token {max(tokens)}, and the model has embeddings for "
            f"{vocab_size}; is it the tokenizer of this model?"
        )
    merges = [
        tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]
    ]
    pieces = bool(data["model"].get("byte_fallback"))
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_prefix(data))
        scores = _scores(data, merges)
        worst = -float(len(merges) + 1)
        writer.add_token_scores([scores.get(tokens.get(i, ""), worst) for i in range(vocab_size)])
    else:
        _check_normalizer(data)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(data))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    listed = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [_kind(i, tokens.get(i), tokenizer, pieces) for i in range(vocab_size)]
    if pieces:  # what is looked for in a text has spaces, as the text
        own = TokenType.USER_DEFINED
        listed = [
            t.replace(SPACE, " ") if k == own else t for t, k in zip(listed, kinds, strict=True)
        ]
    writer.add_token_list(listed)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(_templates(tokenizer.chat_template))


def _kind(index: int, token: str | None, tokenizer: Any, pieces: bool) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if pieces and token == tokenizer.unk_token:
        return TokenType.UNKNOWN
    added = tokenizer.added_tokens_decoder.get(index)
    if added is not None:
        return TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return TokenType.BYTE if pieces and BYTE.fullmatch(token) else TokenType.NORMAL


def _add_special(writer: GGUFWriter, tokenizer: Any) -> None:
    for name in SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if tokenizer.eos_token_id is None:  # llama.cpp would take 11 or 2 for it
        raise UnsupportedError(
            "gguf: the tokenizer has no token for the end of a text; name one as `eos_token` in "
            "tokenizer_config.json"
        )
    plain = tokenizer.encode("a", add_special_tokens=False)
    around = tokenizer.encode("a", add_special_tokens=True)
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if around == bos * before + plain + eos * after:
            writer.add_add_bos_token(before)
            writer.add_add_eos_token(after)
            return
    raise UnsupportedError(
        f"gguf: the tokenizer makes {around} of {plain}, and llama.cpp adds the tokens for the "
        "start and the end of a text alone"
    )


def _templates(template: Any) -> Any:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _check_normalizer(data: Mapping[str, Any]) -> None:
    for step in steps_of(data["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # llama.cpp leaves it out; composed text stays as it is
            raise UnsupportedError(
                f"gguf: the tokenizer changes a text by {step['type']}, and llama.cpp does not"
            )


def _has_prefix(data: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front; the spelling of spaces has to be SentencePiece's."""
    steps = [
        *steps_of(data["normalizer"], "normalizers"),
        *steps_of(data["pre_tokenizer"], "pretokenizers"),
    ]
    prefix, spelt = False, False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                spelt = True
            case {
                "type": "Metaspace",
                "replacement": "\u2581",
                "prepend_scheme": scheme,
                "split": False,
            }:
                prefix, spelt = prefix or scheme != "never", True
            case _:
                raise UnsupportedError(
                    f"gguf: the tokenizer changes a text by {step['type']}, and llama.cpp does not"
                )
    if not spelt:
        raise UnsupportedError("gguf: the tokenizer does not spell spaces as SentencePiece does")
    return prefix


def _scores(data: Mapping[str, Any], merges: list[Any]) -> dict[str, float]:
    """The score of every token that is merged: the earlier, the higher.

    llama.cpp merges whatever gives a token. So all the ways to cut a token in two have to be among
    the merges, one after the other, as they are where a model of SentencePiece was converted.
    """
    vocab = data["model"]["vocab"]
    made: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        made.setdefault(left + right, []).append(rank)
    pairs = set(merges)
    for token, ranks in made.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        ways = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        if ranks != [*range(ranks[0], ranks[0] + len(ranks))] or not pairs.issuperset(ways):
            raise UnsupportedError(
                f"gguf: the tokenizer merges {token!r} in an order that SentencePiece, and with it "
                "llama.cpp, does not have"
            )
    return {token: -float(ranks[0]) for token, ranks in made.items()}
