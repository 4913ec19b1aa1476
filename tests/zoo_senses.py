"""Models of transformers that see, hear, or read numbers; and those that read text as well."""

from typing import Any

import torch
from zoo import ENCODER_DECODER, SIZES, TOKENS, VISION, Case, D, H
from zoo_text import tiny, with_changes

from upcycle.capture.capture import ExampleInputs

LAYERS = 3


def _vision(
    cls: str,
    activation: str = "gelu",
    placement: str = "module",
    ffns: int = LAYERS,
    misses: int | None = None,
    **options: Any,
) -> Case:
    return Case(tiny(cls, **{**VISION, **options}), ffns, placement, activation, misses=misses)


def _stages(
    cls: str, activation: str = "gelu", placement: str = "siblings", ffns: int = 4, **options: Any
) -> Case:
    """A vision model of stages that halve the resolution, with one block in each."""
    return Case(tiny(cls, image_size=64, **options), ffns, placement, activation)


def _audio(
    cls: str,
    activation: str = "gelu",
    placement: str = "module",
    ffns: int = LAYERS,
    **options: Any,
) -> Case:
    options = {**SIZES, "num_hidden_layers": LAYERS, **CONVOLUTIONS, **options}
    return Case(tiny(cls, **options), ffns, placement, activation)


def _masked() -> ExampleInputs:
    """The noise that decides which patches are seen is an argument, too."""
    return {"pixel_values": torch.zeros(2, 3, 32, 32), "noise": torch.zeros(2, 16)}


CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 99,
}
PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, D, D], "mlp_ratios": [2, 2, 2, 2]}
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
TEXT_PART = {**TOKENS, **SIZES, "num_hidden_layers": 2, "projection_dim": 16}
VISION_PART = {**VISION, "num_hidden_layers": 2, "projection_dim": 16}
PARTS = {"text_config": TEXT_PART, "vision_config": VISION_PART, "projection_dim": 16}
SERIES = {
    **ENCODER_DECODER,
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
}

IMAGES: dict[str, Case] = {
    "beit": _vision("BeitModel"),
    "clip_vision": _vision("CLIPVisionModel", "quick_gelu"),
    "convnextv2": Case(  # its response normalisation mixes the hidden axis
        tiny("ConvNextV2Model", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 3, 1], image_size=32),
        0, "", "", misses=6,
    ),
    "cvt": _stages(
        "CvtModel", ffns=6, depth=[1, 2, 3], embed_dim=[16, 16, 32], num_heads=[1, 2, 4]
    ),
    "data2vec_vision": _vision("Data2VecVisionModel", placement="siblings"),
    "deit": _vision("DeiTModel"),
    "dinov2": _vision("Dinov2Model", mlp_ratio=2),
    "dinov2_swiglu": _vision("Dinov2Model", "swiglu", use_swiglu_ffn=True),
    "dinov2_registers": _vision("Dinov2WithRegistersModel", mlp_ratio=2),
    "dinov3_convnext": Case(
        tiny("DINOv3ConvNextModel", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 3, 1]),
        6, "inline", "gelu",
    ),
    "dinov3_vit": _vision("DINOv3ViTModel"),
    "dpt": _vision("DPTModel", placement="siblings"),
    "focalnet": _stages(
        "FocalNetModel", placement="module", patch_size=4, embed_dim=16, depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 64, 128],
    ),
    "glpn": _stages("GLPNModel", "", "", 0, **PYRAMID, num_attention_heads=[1, 2, 2, 4]),
    "hiera": Case(
        tiny("HieraModel", image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1],
             num_heads=[1, 2, 4, 8], mlp_ratio=2.0),
        4, "module", "gelu",
    ),
    "ijepa": _vision("IJepaModel"),
    "mlcd": _vision("MLCDVisionModel"),
    "pixtral_vision": _vision("PixtralVisionModel", "swiglu", hidden_act="silu"),
    "poolformer": _stages(
        "PoolFormerModel", placement="module", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, D, D],
        mlp_ratio=2.0,
    ),
    "pvt": _stages("PvtModel", placement="module", **PYRAMID, num_attention_heads=[1, 2, 2, 4]),
    "pvt_v2": _stages("PvtV2Model", "", "", 0, **PYRAMID, num_attention_heads=[1, 2, 2, 4]),
    "resnet": _stages("ResNetModel", "", "", 0, hidden_sizes=[8, 8], depths=[1, 1]),
    "segformer": _stages("SegformerModel", "", "", 0, **PYRAMID),
    "siglip_vision": _vision("SiglipVisionModel", "gelu_tanh", ffns=LAYERS + 1),
    "siglip2_vision": _vision(
        "Siglip2VisionModel", "gelu_tanh", ffns=LAYERS + 1, num_patches=16
    ),
    "swin": _stages("SwinModel", placement="module", ffns=2, **SWIN),
    "swinv2": _stages("Swinv2Model", ffns=2, **SWIN),
    "timesformer": _vision("TimesformerModel", placement="siblings", num_frames=2),
    "videomae": _vision("VideoMAEModel", placement="siblings", num_frames=2),
    "vit_mae": with_changes(_vision("ViTMAEModel"), example=_masked),
    "vit_msn": _vision("ViTMSNModel"),
    "vitdet": _vision("VitDetModel", mlp_ratio=2, window_block_indices=[0]),
    "vivit": _vision("VivitModel", "gelu_tanh", num_frames=2, tubelet_size=[2, 8, 8]),
    "yolos": _vision(
        "YolosModel", placement="siblings", image_size=[32, 32], num_detection_tokens=3
    ),
}  # fmt: skip

SOUNDS: dict[str, Case] = {
    "ast": Case(
        tiny("ASTModel", **SIZES, num_hidden_layers=LAYERS, num_mel_bins=32, max_length=64),
        LAYERS, "module", "gelu",
    ),
    "data2vec_audio": _audio("Data2VecAudioModel", num_conv_pos_embeddings=2),
    "hubert": _audio("HubertModel"),
    "sew": _audio("SEWModel", squeeze_factor=2),
    "speech_to_text": Case(
        tiny("Speech2TextModel", **TOKENS, **ENCODER_DECODER, input_feat_per_channel=16,
             conv_channels=16),
        4, "inline", "relu",
    ),
    "unispeech": _audio("UniSpeechModel"),
    "wav2vec2": _audio("Wav2Vec2Model"),
    "wav2vec2_bert": _audio(  # macaron: two halves
        "Wav2Vec2BertModel", "silu", ffns=2 * LAYERS, feature_projection_input_dim=16
    ),
    "wav2vec2_conformer": _audio("Wav2Vec2ConformerModel", ffns=2 * LAYERS),
    "wavlm": _audio("WavLMModel"),
}  # fmt: skip

SERIES_MODELS: dict[str, Case] = {
    "autoformer": Case(tiny("AutoformerModel", **SERIES), 4, "inline", "gelu"),
    "informer": Case(tiny("InformerModel", **SERIES), 4, "inline", "gelu"),
    "patchtst": Case(
        tiny("PatchTSTModel", d_model=D, ffn_dim=H, num_hidden_layers=LAYERS,
             num_attention_heads=4, num_input_channels=2, context_length=32, patch_length=8,
             patch_stride=8),
        LAYERS, "module", "gelu",
    ),
    "time_series_transformer": Case(
        tiny("TimeSeriesTransformerModel", **SERIES), 4, "inline", "gelu"
    ),
}  # fmt: skip

BOTH: dict[str, Case] = {
    "altclip": Case(tiny("AltCLIPModel", **PARTS), 4, "module, siblings", "gelu, quick_gelu"),
    "blip": Case(tiny("BlipModel", **PARTS), 4, "module, siblings", "gelu"),
    "chinese_clip": Case(
        tiny("ChineseCLIPModel", **PARTS), 4, "module, siblings", "gelu, quick_gelu"
    ),
    "clip": Case(tiny("CLIPModel", **PARTS), 4, "module", "quick_gelu"),
    "clip_text": Case(tiny("CLIPTextModel", **TEXT_PART), 2, "module", "quick_gelu"),
    "clipseg": Case(tiny("CLIPSegModel", **PARTS), 4, "module", "quick_gelu"),
    "git": Case(
        tiny("GitModel", **TEXT_PART, vision_config=VISION_PART), 4, "module, siblings",
        "gelu, quick_gelu",
    ),
    "siglip": Case(tiny("SiglipModel", **PARTS), 5, "module", "gelu_tanh"),
    "vilt": Case(
        tiny("ViltModel", **VISION, **TOKENS), LAYERS, "siblings", "gelu"
    ),
    "visual_bert": Case(
        tiny("VisualBertModel", **TOKENS, **SIZES, num_hidden_layers=LAYERS), LAYERS, "siblings",
        "gelu",
    ),
}  # fmt: skip

SENSES: dict[str, Case] = {**IMAGES, **SOUNDS, **SERIES_MODELS, **BOTH}
