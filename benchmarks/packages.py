"""Convert models of other packages: python benchmarks/packages.py [--vision].

    pip install --no-deps -r benchmarks/packages.txt

installs what it needs, without another torch, in half a minute. Each model is small and random, and
runs as its package runs it. Prints a table, and ends with 1 if a model is not converted exactly.
``--vision`` takes those that need torchvision instead, which brings a torch of its own: in another
environment, `pip install torch torchvision open_clip_torch vit-pytorch timm`.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import upcycle

Built = tuple[nn.Module, Any]  # a model and its inputs


def unet_of_stable_diffusion() -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    return model, inputs


def unet_of_images() -> Built:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([7])}


def diffusion_transformer() -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, inputs


def transformer_of_stable_diffusion_3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 5]),
    }
    return model, inputs


def decoder_of_x_transformers() -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, ff_glu=True)
    model = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers)
    return model, {"x": torch.randint(0, 50, (2, 12))}


def encoder_of_x_transformers() -> Built:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=16, depth=2, heads=2)
    model = ViTransformerWrapper(image_size=16, patch_size=4, num_classes=5, attn_layers=layers)
    return model, {"img": torch.randn(2, 3, 16, 16)}


def graph_transformer() -> Built:
    from torch_geometric.nn import GINConv, GPSConv

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
            self.layer = GPSConv(16, GINConv(mlp), heads=2)

        def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x, edge_index)
            return out

    return Graph(), {"x": torch.randn(6, 16), "edge_index": torch.tensor([[0, 1, 2], [1, 2, 3]])}


def policy_of_stable_baselines() -> Built:
    import numpy as np
    from gymnasium.spaces import Box
    from stable_baselines3.common.policies import ActorCriticPolicy

    space = Box(-np.ones(6, np.float32), np.ones(6, np.float32))
    model = ActorCriticPolicy(space, space, lambda _: 1e-3, net_arch=[32, 16])
    return model, {"obs": torch.randn(4, 6), "deterministic": True}


def clip_of_open_clip() -> Built:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=4, image_size=16)
    text = CLIPTextCfg(context_length=12, vocab_size=99, width=32, heads=4, layers=2)
    model = CLIP(16, vision, text)
    return model, {"image": torch.randn(2, 3, 16, 16), "text": torch.randint(1, 99, (2, 12))}


def vit_of_vit_pytorch() -> Built:
    from vit_pytorch import ViT

    model = ViT(image_size=16, patch_size=4, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64)
    return model, {"img": torch.randn(2, 3, 16, 16)}


def cait_of_vit_pytorch() -> Built:
    from vit_pytorch.cait import CaiT

    model = CaiT(
        image_size=16, patch_size=4, num_classes=5, dim=32, depth=2, cls_depth=1, heads=4,
        mlp_dim=64,
    )  # fmt: skip
    return model, {"img": torch.randn(2, 3, 16, 16)}


def swin_of_torchvision() -> Built:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([2, 2], 16, [1, 1], [2, 4], [4, 4], num_classes=5)
    return model, {"x": torch.randn(2, 3, 32, 32)}


MODELS: Mapping[str, Callable[[], Built]] = {
    "diffusers UNet2DConditionModel": unet_of_stable_diffusion,
    "diffusers UNet2DModel": unet_of_images,
    "diffusers DiTTransformer2DModel": diffusion_transformer,
    "diffusers SD3Transformer2DModel": transformer_of_stable_diffusion_3,
    "x-transformers decoder, GLU": decoder_of_x_transformers,
    "x-transformers ViT": encoder_of_x_transformers,
    "torch_geometric GPSConv": graph_transformer,
    "stable-baselines3 ActorCriticPolicy": policy_of_stable_baselines,
}
VISION: Mapping[str, Callable[[], Built]] = {
    "open_clip CLIP": clip_of_open_clip,
    "vit-pytorch ViT": vit_of_vit_pytorch,
    "vit-pytorch CaiT": cait_of_vit_pytorch,
    "torchvision SwinTransformer": swin_of_torchvision,
}


def tried(build: Callable[[], Built]) -> tuple[int, int, str]:
    """FFNs that were found and that were converted, and how that ended."""
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    try:
        located = upcycle.locate(model, inputs)
        found = len(located.ffns)
        done = upcycle.convert(model, "sparse-upcycling", inputs, overrides=["experts.count=4"])
    except upcycle.UpcycleError as error:
        return 0, 0, str(error)
    end = done.report.end_to_end
    assert end is not None
    worst = max(output.relative for output in end.outputs.values())
    return found, len(done.plan.specs), f"{worst:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", action="store_true", help="models that need torchvision")
    models = VISION if parser.parse_args().vision else MODELS
    table = Table("model", "FFNs found", "converted", "relative error, or why not")
    wrong = 0
    for name, build in models.items():
        found, converted, said = tried(build)
        wrong += not converted
        table.add_row(name, str(found), str(converted), said)
    Console(width=140).print(table)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
