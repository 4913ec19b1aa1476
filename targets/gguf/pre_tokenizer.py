"""The name by which llama.cpp knows how a byte-level BPE tokenizer cuts a text into words.

llama.cpp has the regular expressions built in and the file has their name. Its own converter finds
the name by the tokens of a text, so that it knows published vocabularies alone; here it is found by
the expressions themselves. Read: ``src/llama-vocab.cpp`` in llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UnsupportedError

GPT2 = "the words of GPT-2"  # inside the pre-tokenizer ByteLevel
DIGIT = "\\p{N}"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTION + "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# The expressions in their order, and whether a word that is a token is taken whole.
NAMES = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((_WORDS % "",), False): "qwen2",
    ((_WORDS % "{1,3}",), True): "llama-bpe",
    ((_WORDS % "{1,3}",), False): "dbrx",
}


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """The name for the contents of a ``tokenizer.json``.

    Raises:
        UnsupportedError: llama.cpp, as far as known here, has none for these expressions.
    """
    steps = steps_of(tokenizer["pre_tokenizer"], "pretokenizers")
    expressions = tuple(found for step in steps if (found := _expression(step)) is not None)
    name = NAMES.get((expressions, bool(tokenizer["model"].get("ignore_merges"))))
    if name is None:
        raise UnsupportedError(
            f"gguf: no pre-tokenizer of llama.cpp is known here to cut a text by {expressions}; "
            f"those known are {', '.join(sorted(NAMES.values()))}"
        )
    return name


def steps_of(part: Any, inner: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer; a Sequence lists them under `inner`."""
    if part is None:
        return []
    return (
        [s for p in part[inner] for s in steps_of(p, inner)]
        if part["type"] == "Sequence"
        else [part]
    )


def _expression(step: Mapping[str, Any]) -> str | None:
    """What one pre-tokenizer cuts by; None for one that only spells bytes."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return GPT2 if words else None
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {
            "type": "Split",
            "behavior": "Isolated",
            "invert": False,
            "pattern": {"Regex": text},
        } | {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": text}}:
            return str(text)
    return f"{step['type']} { ({k: v for k, v in step.items() if k != 'type'}) }"
