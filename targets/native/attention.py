"""Rules that write what is outside the FFNs as another architecture has it, exactly."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import TensorRule

NAMES = r"(model\.layers\.\d+\.self_attn\.{name})"


def head_dim(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def interleaved_rope(
    config: PreTrainedConfig, layers: Sequence[int] | None = None
) -> list[TensorRule]:
    """Queries and keys for a RoPE that turns neighbours where the dense one turns halves.

    Output j of a head goes to 2j, and output j + d/2 to 2j + 1; scores are sums over all of them.
    `layers` are those that have RoPE; all if None.
    """
    half = head_dim(config) // 2

    def permuted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, 2, half, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)

    numbers = r"\d+" if layers is None else "(?:" + "|".join(map(str, layers)) + ")"
    pattern = rf"(model\.layers\.{numbers}\.self_attn\.[qk]_proj\.(?:weight|bias))"
    return [TensorRule(pattern, r"\1", permuted)]


def zero_biases(config: PreTrainedConfig) -> list[TensorRule]:
    """Biases of zero for queries, keys and values, beside their weights."""

    pattern = NAMES.format(name="[qkv]_proj") + r"\.weight"
    return [
        TensorRule(pattern, r"\1.weight"),
        TensorRule(pattern, r"\1.bias", lambda weight: weight.new_zeros(weight.shape[0])),
    ]


def split_qkv(config: PreTrainedConfig) -> list[TensorRule]:
    """One matrix for queries, keys and values -> three."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    sizes = [head_dim(config) * count for count in heads]
    pattern = NAMES.format(name="") + r"qkv_proj\.weight"

    def part(word: str, index: int) -> TensorRule:
        return TensorRule(pattern, rf"\1{word}_proj.weight", lambda t: torch.split(t, sizes)[index])

    return [part(word, index) for index, word in enumerate("qkv")]


def no_sinks(config: PreTrainedConfig) -> list[TensorRule]:
    """Attention sinks that take no weight, beside the queries."""

    def sinks(tensor: torch.Tensor) -> torch.Tensor:
        least = max(-1e9, torch.finfo(tensor.dtype).min)
        return tensor.new_full((config.num_attention_heads,), least)

    pattern = NAMES.format(name="") + r"q_proj\.weight"
    return [
        TensorRule(pattern, r"\1q_proj.weight"),
        TensorRule(pattern, r"\1sinks", sinks),
    ]


def one_more(config: PreTrainedConfig) -> list[TensorRule]:
    """Norms that multiply by 1 + w -> norms that multiply by w."""
    return [TensorRule(r"(model\.(?:.*layernorm|norm)\.weight)", r"\1", lambda t: t + 1)]


def renamed(old: str, new: str) -> TensorRule:
    """Every tensor whose name contains `old` between dots."""
    return TensorRule(rf"(.+\.){re.escape(old)}(\..+)", rf"\g<1>{new}\g<2>")


def untied() -> list[TensorRule]:
    """The embeddings also as an output matrix of their own."""
    embeddings = "model.embed_tokens.weight"
    return [TensorRule(re.escape(embeddings), name) for name in (embeddings, "lm_head.weight")]


def no_windows(config: PreTrainedConfig) -> str | None:
    """For an architecture that attends to everything in all layers."""
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "some layers attend through a sliding window (layer_types), and it has none"
    return None


def one_window(config: PreTrainedConfig) -> str | None:
    """For an architecture with one sliding window for all layers, or none."""
    if len(set(config.layer_types)) > 1:
        return (
            "some layers attend through a sliding window and some do not (layer_types), "
            "and it has one rule for all layers"
        )
    return None
