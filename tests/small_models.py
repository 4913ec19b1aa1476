"""Small random models of real architectures, for tests that convert whole models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

t: Any = transformers  # its classes have no types that a checker could follow

# A large spread: with the default of 0.02 a wrong FFN would hardly move the output.
STD = {"initializer_range": 0.2}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DECODER: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    **STD,
    **NO_TOKENS,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **STD,
}


def llama(**changes: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**{**DECODER, **changes}))


def mistral() -> Any:
    return t.MistralForCausalLM(t.MistralConfig(**DECODER, sliding_window=8))


def qwen3() -> Any:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=8))


def gpt2() -> Any:
    config = t.GPT2Config(
        vocab_size=300, n_positions=1024, n_embd=32, n_layer=2, n_head=4, **STD, **NO_TOKENS
    )
    return t.GPT2LMHeadModel(config)


def opt() -> Any:
    config = t.OPTConfig(
        vocab_size=300,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        word_embed_proj_dim=32,
        init_std=0.2,
        **{**NO_TOKENS, "pad_token_id": 1},
    )
    return t.OPTForCausalLM(config)


def bert() -> Any:
    return t.BertForMaskedLM(t.BertConfig(vocab_size=300, **ENCODER))


def vit() -> Any:
    config = t.ViTConfig(image_size=16, patch_size=8, num_labels=5, **ENCODER)
    return t.ViTForImageClassification(config)


def t5() -> Any:
    config = t.T5Config(
        vocab_size=300,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        initializer_factor=1.0,
    )
    return t.T5ForConditionalGeneration(config)


def whisper() -> Any:
    config = t.WhisperConfig(
        vocab_size=300,
        num_mel_bins=8,
        encoder_layers=2,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        d_model=32,
        max_source_positions=20,
        max_target_positions=64,
        init_std=0.2,
        decoder_start_token_id=1,
        **NO_TOKENS,
    )
    return t.WhisperForConditionalGeneration(config)


BUILD: dict[str, Callable[..., Any]] = {
    build.__name__: build for build in (llama, mistral, qwen3, gpt2, opt, bert, vit, t5, whisper)
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model of that name, in eval mode; the same seed gives the same weights. `changes` are
    keys of a llama's configuration."""
    torch.manual_seed(seed)
    return BUILD[name](**changes).eval()


def tokenizer() -> Any:
    """A tokenizer with 300 words, among them every letter."""
    words = ["<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;()'\"*_-"]
    words += [f"w{i}" for i in range(300 - len(words))]
    word_of = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordLevel(word_of, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", pad_token="<pad>", model_max_length=512
    )


def saved(name: str, directory: Path, *, with_tokenizer: bool = False, **changes: Any) -> Path:
    """The model as a Hugging Face directory."""
    build(name, **changes).save_pretrained(directory)
    if with_tokenizer:
        tokenizer().save_pretrained(directory)
    return directory


class Plain(nn.Module):
    """Two residual FFNs, with LayerNorm, in plain PyTorch."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x))
        return x


def plain() -> nn.Module:
    """For ``small_models:plain``."""
    torch.manual_seed(0)
    return Plain()


def weightless() -> nn.Module:
    """For ``small_models:weightless``."""
    with torch.device("meta"):
        return Plain()


def plain_inputs() -> tuple[torch.Tensor, ...]:
    """For ``--inputs small_models:plain_inputs``."""
    return (torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)),)


def wrong_inputs() -> tuple[torch.Tensor, ...]:
    """Of a width that no layer takes."""
    return (torch.zeros(2, 7),)


class WithoutFFN(nn.Module):
    """Two linear maps with a softmax between them: attention over memories, not an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.keys(x)
        out: torch.Tensor = self.values(scores.softmax(-1))
        return out


def without_ffn() -> nn.Module:
    """For ``small_models:without_ffn``."""
    return WithoutFFN()
