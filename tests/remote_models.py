"""Small random models of the architectures that have no native MoE twin, with several heads."""

from collections.abc import Callable
from typing import Any

import small_models
import torch
import transformers

t: Any = transformers  # its classes have no types that a checker could follow

NO_TOKENS = small_models.NO_TOKENS
TEXT: dict[str, Any] = {"vocab_size": 300, **small_models.ENCODER, **NO_TOKENS, "pad_token_id": 0}
VISION: dict[str, Any] = {"image_size": 16, "patch_size": 8, **small_models.ENCODER}
GEMMA: dict[str, Any] = {**small_models.DECODER, "head_dim": 8, "sliding_window": 4}
SPEECH: dict[str, Any] = {
    **{"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "vocab_size": 20},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "layerdrop": 0.0},
    **{"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, **small_models.ENCODER},
}


def _distilbert() -> Any:
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    return t.DistilBertConfig(vocab_size=300, **sizes, **small_models.STD)


def _two_towers(config: Any) -> Any:
    text = {"max_position_embeddings": 16, **TEXT, "eos_token_id": 2, "projection_dim": 24}
    vision = {**VISION, "projection_dim": 24}
    return config(text_config=text, vision_config=vision, projection_dim=24)


def _t5(**changes: Any) -> Any:
    sizes = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    return t.T5Config(**sizes, num_heads=4, initializer_factor=1.0, **tokens, **changes)


def _bart() -> Any:
    sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    sizes = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sides.items()}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "forced_eos_token_id": None}
    return t.BartConfig(
        vocab_size=300,
        d_model=32,
        max_position_embeddings=64,
        init_std=0.2,
        decoder_start_token_id=1,
        **sizes,
        **tokens,
    )


def _gpt_neox() -> Any:
    return t.GPTNeoXConfig(vocab_size=300, **small_models.ENCODER, **NO_TOKENS)


# name -> (class, configuration, whether it generates text)
MODELS: dict[str, tuple[str, Callable[[], Any], bool]] = {
    "bert-masked": ("BertForMaskedLM", lambda: t.BertConfig(**TEXT), False),
    "bert-sequence": ("BertForSequenceClassification", lambda: t.BertConfig(**TEXT), False),
    "bert-base": ("BertModel", lambda: t.BertConfig(**TEXT), False),
    "roberta-masked": ("RobertaForMaskedLM", lambda: t.RobertaConfig(**TEXT), False),
    "roberta-token": ("RobertaForTokenClassification", lambda: t.RobertaConfig(**TEXT), False),
    "distilbert-masked": ("DistilBertForMaskedLM", _distilbert, False),
    "distilbert-sequence": ("DistilBertForSequenceClassification", _distilbert, False),
    "vit-image": ("ViTForImageClassification", lambda: t.ViTConfig(**VISION), False),
    "vit-base": ("ViTModel", lambda: t.ViTConfig(**VISION), False),
    "dinov2-base": ("Dinov2Model", lambda: t.Dinov2Config(**VISION, mlp_ratio=2), False),
    "dinov2-swiglu": (
        "Dinov2ForImageClassification",
        lambda: t.Dinov2Config(**VISION, mlp_ratio=2, use_swiglu_ffn=True),
        False,
    ),
    "clip": ("CLIPModel", lambda: _two_towers(t.CLIPConfig), False),
    "siglip": ("SiglipModel", lambda: _two_towers(t.SiglipConfig), False),
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda: small_models.whisper().config,
        True,
    ),
    "wav2vec2-ctc": ("Wav2Vec2ForCTC", lambda: t.Wav2Vec2Config(**SPEECH), False),
    "wav2vec2-base": ("Wav2Vec2Model", lambda: t.Wav2Vec2Config(**SPEECH), False),
    "gpt2": ("GPT2LMHeadModel", lambda: small_models.gpt2().config, True),
    "gpt2-sequence": (
        "GPT2ForSequenceClassification",
        lambda: t.GPT2Config(**{**small_models.gpt2().config.to_dict(), "pad_token_id": 0}),
        False,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", _gpt_neox, True),
    "opt": ("OPTForCausalLM", lambda: small_models.opt().config, True),
    "gemma2": ("Gemma2ForCausalLM", lambda: t.Gemma2Config(**GEMMA), True),
    "gemma3": ("Gemma3ForCausalLM", lambda: t.Gemma3TextConfig(**GEMMA), True),
    "t5-gated": (
        "T5ForConditionalGeneration",
        lambda: _t5(feed_forward_proj="gated-gelu"),
        True,
    ),
    "t5-encoder": ("T5EncoderModel", _t5, False),
    "bart": ("BartForConditionalGeneration", _bart, True),
    "bart-base": ("BartModel", _bart, False),
}


def build(name: str) -> Any:
    """The model of that name, in eval mode; always the same weights."""
    class_name, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(t, class_name)(config()).eval()
    with torch.no_grad():  # norms start at one and biases at zero, which hides mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
