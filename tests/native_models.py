"""Small dense models of every architecture that a native target holds, and plans for them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cohere2Config,
    Ernie4_5Config,
    GemmaConfig,
    GraniteConfig,
    GraniteSWAConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
    T5Config,
)

from upcycle.ir.ffn import Located
from upcycle.passes.locate.locate import locate_in

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # with the default 0.02 a wrong FFN would hardly show
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FACTORS: dict[str, float] = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
COHERE_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
T5: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3_ROPE), head_dim=12),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-bias": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5, head_dim=12),
    "phi3": lambda: Phi3Config(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-sliding": lambda: Qwen2Config(**SIZES, **WINDOW),
    "seed_oss": lambda: SeedOssConfig(**SIZES, head_dim=12, residual_dropout=0.0),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "qwen3-sliding": lambda: Qwen3Config(**SIZES, **WINDOW, head_dim=12),
    "qwen3_5": lambda: Qwen3_5TextConfig(**SIZES, **LINEAR, head_dim=16),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "granite": lambda: GraniteConfig(**SIZES, **FACTORS),
    "granite_swa": lambda: GraniteSWAConfig(**SIZES, **FACTORS, sliding_window=5),
    "ernie4_5": lambda: Ernie4_5Config(**SIZES, head_dim=8),
    "cohere2": lambda: Cohere2Config(**SIZES, sliding_window=5, layer_types=COHERE_LAYERS),
    "hunyuan": lambda: HunYuanDenseV1Config(**SIZES, head_dim=8),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "t5": lambda: T5Config(**T5),
}


@cache
def dense_model(name: str) -> nn.Module:
    """A model with random weights, norms and biases included; not to be changed."""
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = auto.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero, which hides mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@cache
def located(name: str) -> Located:
    """The FFNs of `dense_model`."""
    return locate_in(dense_model(name), inputs(name))


def inputs(name: str, count: int = 24) -> dict[str, torch.Tensor]:
    """Tokens for a model, [2, count]."""
    tokens = torch.randint(1, 97, (2, count), generator=torch.Generator().manual_seed(1))
    if name == "t5":
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)[:, : count // 2]}
    return {"input_ids": tokens}
