"""Tiny models of many architectures, with random weights, and what is to be found in them.

Their weights are drawn large enough that every FFN moves the output: a conversion that lost one
would show. `test_rewrite.py` holds that.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn
from zoo_blocks import (
    D,
    FunctionalMLP,
    FusedInline,
    H,
    MatmulMLP,
    Places,
    Residual,
    mlp,
)

from upcycle.capture.capture import ExampleInputs
from upcycle.capture.guess_inputs import find_example, randomised

VOCABULARY = 99
SIZES = {"hidden_size": D, "intermediate_size": H, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A model and what is found in it.

    Attributes:
        build: makes the dense model; call `model` for one with weights that matter.
        ffns: how many FFNs are converted.
        placement: of each of them.
        activation: of each of them.
        example: inputs, where the guess would not do.
        generates: it is a decoder with a cache.
        misses: how many regions are refused, or None where that says nothing of the architecture.
    """

    build: Callable[[], nn.Module]
    ffns: int
    placement: str
    activation: str
    example: Callable[[], ExampleInputs] | None = None
    generates: bool = False
    misses: int | None = None


def model(name: str) -> nn.Module:
    """The dense model, in evaluation mode, the same for every call."""
    return drawn(ZOO[name])


def drawn(case: Case) -> nn.Module:
    """The model of a case, in evaluation mode, the same for every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = case.build()
        _draw(dense)
    return dense.eval()


@functools.cache
def _example(name: str) -> ExampleInputs:
    make = ZOO[name].example
    return make() if make else find_example(model(name))[0]


def inputs(name: str, seed: int = 1) -> ExampleInputs:
    """Random inputs for the model."""
    return randomised(_example(name), vocabulary=VOCABULARY, seed=seed)


def run(dense: nn.Module, example: ExampleInputs) -> torch.Tensor:
    """The first output of a model, which draws the same numbers each time if it draws any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = dense(*example) if isinstance(example, tuple) else dense(**example)
    first = out if isinstance(out, torch.Tensor) else next(iter(dict(out).values()))
    assert isinstance(first, torch.Tensor)
    return first


@torch.no_grad()
def _draw(dense: nn.Module) -> None:
    """Matrices that keep the size of what they map, small biases, and no layer scale near zero."""
    for parameter in dense.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, max(parameter[0].numel(), 1) ** -0.5)
        elif parameter.abs().max() == 0:
            parameter.normal_(0, 0.1)
        elif parameter.abs().max() < 0.1:
            parameter.fill_(1.0)


def _text(cls: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: cls(config(**{**TOKENS, **options}))


def _decoder(cls: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    return _text(cls, config, **{**SIZES, "num_hidden_layers": 3, **options})


def _vectors() -> ExampleInputs:
    return (torch.zeros(2, 7, D),)


def _encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(D, 4, H, batch_first=True, **options)


ENCODER_DECODER = {
    "d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": H, "decoder_ffn_dim": H,
    "decoder_start_token_id": 1,
}  # fmt: skip
GPT2 = {"n_embd": D, "n_layer": 3, "n_head": 4}
T5 = {"d_model": D, "d_ff": H, "num_layers": 2, "num_heads": 4, "d_kv": 8}
T5_START = {"decoder_start_token_id": 0}
VISION = {**SIZES, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
GROUPED = {"num_key_value_heads": 2}

ZOO: dict[str, Case] = {
    "bert": Case(_decoder(hf.BertForMaskedLM, hf.BertConfig), 3, "siblings", "gelu"),
    "roberta": Case(
        _decoder(hf.RobertaForSequenceClassification, hf.RobertaConfig), 3, "siblings", "gelu"
    ),
    "distilbert": Case(
        _text(hf.DistilBertModel, hf.DistilBertConfig, dim=D, hidden_dim=H, n_layers=3, n_heads=4),
        3,
        "module",
        "gelu",
    ),
    "albert": Case(
        _decoder(hf.AlbertModel, hf.AlbertConfig, embedding_size=16), 1, "inline", "gelu_tanh"
    ),
    "llama": Case(
        _decoder(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED),
        3,
        "module",
        "swiglu",
        generates=True,
    ),
    "mistral": Case(
        _decoder(hf.MistralForCausalLM, hf.MistralConfig, **GROUPED), 3, "module", "swiglu"
    ),
    "qwen3": Case(
        _decoder(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED, head_dim=8), 3, "module", "swiglu"
    ),
    "phi3": Case(
        _decoder(hf.Phi3ForCausalLM, hf.Phi3Config, **GROUPED),
        3,
        "module",
        "swiglu",
        generates=True,
    ),
    "gemma3": Case(
        _decoder(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **GROUPED, head_dim=8),
        3,
        "module",
        "geglu_tanh",
    ),
    "gpt2": Case(
        _text(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT2), 3, "module", "gelu_tanh", generates=True
    ),
    "gptj": Case(
        _text(hf.GPTJForCausalLM, hf.GPTJConfig, **GPT2, rotary_dim=4), 3, "module", "gelu_tanh"
    ),
    "gpt_neox": Case(_decoder(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig), 3, "module", "gelu"),
    "falcon": Case(_decoder(hf.FalconForCausalLM, hf.FalconConfig), 3, "module", "gelu"),
    "bloom": Case(
        _text(hf.BloomForCausalLM, hf.BloomConfig, hidden_size=D, n_layer=3, n_head=4),
        3,
        "inline",
        "gelu_tanh",
        generates=True,
    ),
    "opt": Case(
        _decoder(hf.OPTForCausalLM, hf.OPTConfig, ffn_dim=H, word_embed_proj_dim=D),
        3,
        "inline",
        "relu",
        generates=True,
    ),
    "t5": Case(
        _text(hf.T5ForConditionalGeneration, hf.T5Config, **T5, **T5_START), 4, "module", "relu"
    ),
    "t5_gated": Case(
        _text(
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            **T5,
            **T5_START,
            feed_forward_proj="gated-gelu",
        ),
        4,
        "module",
        "geglu_tanh",
    ),
    "bart": Case(
        _text(hf.BartForConditionalGeneration, hf.BartConfig, **ENCODER_DECODER),
        4,
        "inline",
        "gelu",
    ),
    "whisper": Case(
        _text(
            hf.WhisperForConditionalGeneration,
            hf.WhisperConfig,
            **ENCODER_DECODER,
            max_source_positions=32,
        ),
        4,
        "inline",
        "gelu",
    ),
    "vit": Case(lambda: hf.ViTModel(hf.ViTConfig(**VISION)), 3, "module", "gelu"),
    "convnext": Case(
        lambda: hf.ConvNextModel(
            hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 3, 1], image_size=32)
        ),
        6,
        "inline",
        "gelu",
    ),
    "encoder": Case(
        lambda: nn.TransformerEncoder(_encoder_layer(), 4), 4, "inline", "relu", _vectors
    ),
    "encoder_layer": Case(lambda: _encoder_layer(activation="gelu"), 1, "inline", "gelu", _vectors),
    "decoder_layer": Case(
        lambda: nn.TransformerDecoderLayer(D, 4, H, batch_first=True),
        1,
        "inline",
        "relu",
        lambda: (torch.zeros(2, 7, D), torch.zeros(2, 5, D)),
    ),
    "sequential": Case(mlp, 1, "inline", "gelu"),
    "mlps": Case(lambda: nn.Sequential(*(Residual(mlp()) for _ in range(5))), 5, "module", "gelu"),
    "functional": Case(lambda: Residual(FunctionalMLP()), 1, "module", "gelu", _vectors),
    "interleaved": Case(lambda: Residual(FunctionalMLP(True)), 1, "module", "swiglu", _vectors),
    "matmul": Case(lambda: Residual(MatmulMLP()), 1, "module", "relu", _vectors),
    "fused_inline": Case(lambda: nn.Sequential(FusedInline()), 1, "inline", "swiglu", _vectors),
    "conv": Case(
        lambda: nn.Sequential(nn.Conv2d(8, H, 1), nn.SiLU(), nn.Conv2d(H, 8, 1)),
        1,
        "inline",
        "silu",
        lambda: (torch.zeros(2, 8, 5, 3),),
    ),
    "called_twice": Case(lambda: Residual(mlp(), times=2), 1, "module", "gelu"),
    "placed_twice": Case(Places, 1, "module", "relu", _vectors),
}
