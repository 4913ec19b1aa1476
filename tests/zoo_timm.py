"""Vision models of timm, where it is installed: ``pip install --no-deps timm``.

timm wants torchvision and Pillow for its data sets, and its models need neither. Bringing them in
is not worth it, as a torchvision that does not fit torch breaks transformers too. So the import
here finds `timm.data` with its constants alone, and one empty class of torchvision.

The counts were worked out from the forward of each block, as the comments say.
"""

import importlib
import importlib.util
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from zoo import Case, D

from upcycle.capture.capture import ExampleInputs


def import_timm() -> Any:
    """The package, with what it would take from torchvision and Pillow left out."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    names = ("timm.data", "torchvision", "torchvision.ops", "torchvision.ops.misc")
    modules = {name: ModuleType(name) for name in names}
    modules["timm.data"].__path__ = [str(folder)]
    vars(modules["timm.data"]).update(runpy.run_path(str(folder / "constants.py")))
    frozen = type("FrozenBatchNorm2d", (nn.Module,), {})
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = frozen  # type: ignore[attr-defined]
    absent = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(absent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("timm")
    finally:
        for name in absent:  # so that nobody takes torchvision for installed
            del sys.modules[name]


def _model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: import_timm().create_model(name, num_classes=7, **options)


def _image(size: int) -> Callable[[], ExampleInputs]:
    return lambda: (torch.zeros(2, 3, size, size),)


def _of(module: str, name: str) -> Any:
    import_timm()
    return getattr(importlib.import_module(f"timm.{module}"), name)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": 4}
STAGES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, D)}
WINDOWS = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
SWIN = {**WINDOWS, "depths": (2, 2), "num_heads": (2, 4)}
SMALL, LARGE = _image(32), _image(64)


def _vit(**options: Any) -> Callable[[], nn.Module]:
    return _model("vit_tiny_patch16_224", **{**VIT, **options})


def _mixer(ratio: Any, block: str, mlp: str = "Mlp") -> Callable[[], nn.Module]:
    return lambda: _of("models.mlp_mixer", "MlpMixer")(
        img_size=32, patch_size=8, embed_dim=D, num_blocks=3, num_classes=7, mlp_ratio=ratio,
        block_layer=_of("models.mlp_mixer", block), mlp_layer=_of("layers", mlp),
    )  # fmt: skip


def _metaformer(mixer: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _of("models.metaformer", "MetaFormer")(
        **STAGES, num_classes=7, token_mixers=_of("models.metaformer", mixer), **options
    )


CASES: dict[str, Case] = {
    # One Mlp in each of 3 blocks.
    "timm_vit": Case(_vit(), 3, "module", "gelu", SMALL, misses=0),
    "timm_deit": Case(
        _model("deit_tiny_distilled_patch16_224", **VIT), 3, "module", "gelu", SMALL, misses=0
    ),
    "timm_beit": Case(_model("beit_base_patch16_224", **VIT), 3, "module", "gelu", SMALL, misses=0),
    "timm_vit_swiglu": Case(
        lambda: _vit(mlp_layer=_of("layers", "SwiGLUPacked"), act_layer=nn.SiLU)(),
        3, "module", "swiglu", SMALL, misses=0,
    ),
    # Two Mlps side by side in each of 3 blocks.
    "timm_vit_parallel": Case(
        lambda: _vit(block_fn=_of("models.vision_transformer", "ParallelThingsBlock"))(),
        6, "module", "gelu", SMALL, misses=0,
    ),
    # ViT-22B: one linear map makes q, k, v and the hidden tensor.
    "timm_vit_22b": Case(
        lambda: _vit(block_fn=_of("models.vision_transformer", "ParallelScalingBlock"))(),
        3, "inline", "gelu", SMALL, misses=0,
    ),
    "timm_eva02": Case(
        _model("eva02_tiny_patch14_224", **VIT), 3, "module", "swiglu", SMALL, misses=0
    ),
    # The same with a LayerNorm over the hidden axis.
    "timm_eva02_sub_norm": Case(
        _model("eva02_base_patch14_224", **VIT), 0, "", "", SMALL, misses=3
    ),
    # 3 blocks, and 2 for the class token. Its heads talk through two maps around a softmax.
    "timm_cait": Case(
        _model("cait_xxs24_224", **VIT, depth_token_only=2), 5, "module", "gelu", SMALL, misses=3
    ),
    # 3 blocks, and 2 for the class token; the local mixing between them is by 3x3 convolutions.
    "timm_xcit": Case(
        _model("xcit_nano_12_p8_224", **{**VIT, "img_size": 32}), 5, "module", "gelu", SMALL,
        misses=0,
    ),
    # 2 + 2 blocks.
    "timm_swin": Case(
        _model("swin_tiny_patch4_window7_224", **SWIN), 4, "module", "gelu", SMALL, misses=0
    ),
    # One over the tokens and one over the channels, in 3 blocks.
    "timm_mixer": Case(_mixer((0.5, 4.0), "MixerBlock"), 6, "module", "gelu", SMALL, misses=0),
    # The tokens are mixed by one linear map alone.
    "timm_resmlp": Case(_mixer(4, "ResBlock"), 3, "module", "gelu", SMALL, misses=0),
    # The hidden tensor is gated by that of other tokens.
    "timm_gmlp": Case(_mixer(4, "SpatialGatingBlock", "GatedMlp"), 0, "", "", SMALL, misses=6),
    # 1 + 1 + 2 + 1 blocks; as linear maps of the last axis, and as 1x1 convolutions.
    "timm_convnext": Case(
        _model("convnext_atto", **STAGES, conv_mlp=False), 5, "module", "gelu", LARGE, misses=0
    ),
    "timm_convnext_conv": Case(
        _model("convnext_atto", **STAGES, conv_mlp=True), 5, "module", "gelu", LARGE, misses=0
    ),
    # A norm over the hidden axis (GRN) in each.
    "timm_convnextv2": Case(
        _model("convnextv2_atto", **STAGES), 0, "", "", LARGE, misses=5
    ),
    "timm_poolformer": Case(
        _metaformer("Pooling", mlp_act=nn.GELU, mlp_bias=True, use_mlp_head=False),
        5, "module", "gelu", LARGE, misses=0,
    ),
    # StarReLU has a learnt scale and offset for all neurons: refused; and so are the head, for
    # its norm, and the pairs of maps around a depthwise convolution, one in each block.
    "timm_convformer": Case(_metaformer("SepConv"), 0, "", "", LARGE, misses=11),
    # Batch norm stands behind each expansion, which is only in evaluation a map of each neuron.
    "timm_levit": Case(
        _model("levit_128s", img_size=64, embed_dim=(16, 24, D), depth=(1, 1, 1),
               num_heads=(2, 2, 2), key_dim=8),
        0, "", "", LARGE, misses=5,
    ),
    # 2 + 4 + 3 transformer blocks; its inverted residuals have a 3x3 convolution in the middle.
    "timm_mobilevit": Case(_model("mobilevit_xxs"), 9, "module", "silu", LARGE),
    # The last block has linear maps; the 4 others convolutions with batch norm behind each.
    "timm_efficientformer": Case(
        _model("efficientformer_l1", depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, D)),
        1, "module", "gelu", _image(224),
    ),
    # 1 + 1 + 1 + 1 blocks, and 2 for the class token.
    "timm_volo": Case(
        lambda: _of("models.volo", "VOLO")(
            img_size=32, patch_size=4, layers=(1, 1, 1, 1), stem_hidden_dim=8, num_classes=7,
            embed_dims=(16, D, D, D), num_heads=(2, 4, 4, 4),
        ),
        6, "module", "gelu", SMALL, misses=0,
    ),
    # A block in each of 4 stages, and one Mlp that a parallel block applies at three scales.
    "timm_coat": Case(
        _model("coat_tiny", img_size=64, embed_dims=(D, D, D, D), serial_depths=(1, 1, 1, 1),
               parallel_depth=1),
        5, "module", "gelu", LARGE, misses=0,
    ),
    # Window and grid attention in each of 4 blocks. The squeeze-and-excitation of its convolutions
    # has an FFN's shape with a narrow middle, which is no kind that is converted.
    "timm_maxvit": Case(
        _model("maxvit_pico_rw_256", img_size=64, depths=(1, 1, 1, 1), stem_width=8,
               embed_dim=(16, 16, D, D), transformer_dim_head=8),
        8, "module", "gelu", LARGE,
    ),
    # Pixels and patches, in 3 blocks.
    "timm_tnt": Case(
        _model("tnt_s_legacy_patch16_224", img_size=32, embed_dim=D, inner_dim=8, depth=3,
               num_heads_outer=4),
        6, "module", "gelu", SMALL, misses=0,
    ),
    # A gate by ReLU6, all by 1x1 convolutions: 1 + 1 + 1 + 1 blocks.
    "timm_starnet": Case(
        _model("starnet_s1", base_dim=8, depths=(1, 1, 1, 1)), 4, "siblings", "custom", LARGE,
        misses=0,
    ),
}  # fmt: skip
TIMM = CASES if importlib.util.find_spec("timm") else {}
