"""Models in the style of public code that nobody prepared upcycle for: counts, and no attention."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upcycle
from upcycle.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

D = 32
OTHERS = re.compile(r"attn|attention|to_q|to_kv|head|modulation|(token|position|patch)_embed")
# Sums of at most 128 products in a few layers on one path: `upcycle.ir.rounding.ROUNDING`.
RELATIVE = 1e-5


class CausalAttention(nn.Module):
    """One matrix for q, k and v, and the mask in a buffer."""

    def __init__(self, length: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.heads = heads
        self.register_buffer("mask", torch.tril(torch.ones(length, length)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(D, 2)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:t, :t] == 0, float("-inf"))  # type: ignore[index]
        y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(b, t, D))


class Decoder(nn.Module):
    """A small GPT in one file: learnt positions, blocks without biases, a tied head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.attn = CausalAttention()
            self.mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(D, 4 * D, bias=False), "c_proj": nn.Linear(4 * D, D, bias=False)}
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))

    def __init__(self) -> None:
        super().__init__()
        self.token_embed, self.position_embed = nn.Embedding(50, D), nn.Embedding(16, D)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.norm = nn.LayerNorm(D, bias=False)
        self.lm_head = nn.Linear(D, 50, bias=False)
        self.lm_head.weight = self.token_embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embed(tokens) + self.position_embed(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class Perceiver(nn.Module):
    """Latents that read a long input; the second round has the weights of the first."""

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.LayerNorm(D), nn.Linear(D, 8 * D), nn.Dropout(0.1), nn.Linear(4 * D, D)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, gate = self.net[1](self.net[0](x)).chunk(2, dim=-1)
            return self.net[3](self.net[2](x * F.gelu(gate)))

    class Attention(nn.Module):
        def __init__(self, context: int) -> None:
            super().__init__()
            self.norm, self.norm_context = nn.LayerNorm(D), nn.LayerNorm(context)
            self.to_q = nn.Linear(D, D, bias=False)
            self.to_kv = nn.Linear(context, 2 * D, bias=False)
            self.to_out_attn = nn.Linear(D, D)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            q = self.to_q(self.norm(x))
            k, v = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
            q, k, v = (t.unflatten(-1, (4, -1)) for t in (q, k, v))
            weights = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k).softmax(dim=-1)
            return self.to_out_attn(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, D))
        self.cross, self.cross_ff = self.Attention(10), self.FeedForward()
        self.layers = nn.ModuleList(
            nn.ModuleList([self.Attention(D), self.FeedForward()]) for _ in range(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 7))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        x = self.latents.expand(len(data), -1, -1)
        for _ in range(2):
            x = x + self.cross(x, data)
            x = x + self.cross_ff(x)
            for attention, feed_forward in self.layers:  # type: ignore[misc]
                x = x + attention(x, x)
                x = x + feed_forward(x)
        return self.head(x.mean(1))


class Diffusion(nn.Module):
    """A diffusion transformer: the time shifts, scales and gates what each block does (adaLN)."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
            self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
            self.attn = nn.MultiheadAttention(D, 4, batch_first=True)
            self.mlp = nn.Sequential(
                nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D)
            )
            self.adaln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            parts = self.adaln_modulation(c).unsqueeze(1).chunk(6, dim=-1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
            y = self.norm1(x) * (1 + scale) + shift
            x = x + gate * self.attn(y, y, y, need_weights=False)[0]
            return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(4, D, 2, stride=2)
        self.time_embed = nn.Sequential(nn.Linear(16, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(D, 2 * 2 * 4)

    def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        angles = time[:, None] * torch.exp(-torch.arange(8) / 8 * math.log(10000.0))
        c = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        for block in self.blocks:
            x = block(x, c)
        y = self.head(x).unflatten(1, (4, 4)).unflatten(-1, (2, 2, 4))
        return torch.einsum("bhwpqc->bchpwq", y).flatten(2, 3).flatten(3, 4)


class Conformer(nn.Module):
    """Half an FFN, attention, a convolution module with a GLU, half an FFN."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff1, self.ff2 = self.half(), self.half()
            self.norm, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, 4, batch_first=True)
            self.conv_norm, self.out_norm = nn.LayerNorm(D), nn.LayerNorm(D)
            self.conv = nn.Sequential(
                nn.Conv1d(D, 2 * D, 1),
                nn.GLU(dim=1),
                nn.Conv1d(D, D, 7, padding=3, groups=D),
                nn.BatchNorm1d(D),
                nn.SiLU(),
                nn.Conv1d(D, D, 1),
            )

        @staticmethod
        def half() -> nn.Sequential:
            up, down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
            return nn.Sequential(nn.LayerNorm(D), up, nn.SiLU(), nn.Dropout(0.1), down)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 0.5 * self.ff1(x)
            y = self.norm(x)
            x = x + self.attn(y, y, y, need_weights=False)[0]
            x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2)
            return self.out_norm(x + 0.5 * self.ff2(x))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(10, D, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(D, 20)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = self.embed(frames.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x).log_softmax(dim=-1)


def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.manual_seed(1))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(1))


MODELS = {
    # The 3 blocks; the tied head is one linear map.
    "decoder": (Decoder, lambda: (tokens(),), 3, {"gelu"}),
    # One behind the cross-attention and one in each of 2 layers; both rounds share them.
    "perceiver": (Perceiver, lambda: (floats(2, 12, 10),), 3, {"geglu"}),
    # The 3 blocks, and the MLP 16 -> 32 -> 32 of the time; the modulation has one linear map.
    "diffusion": (
        Diffusion,
        lambda: (floats(2, 4, 8, 8), torch.tensor([3.0, 700.0])),
        4,
        {"gelu_tanh", "silu"},
    ),
    # Two in each of 2 blocks; the convolution module mixes positions between its 1x1 convolutions.
    "conformer": (Conformer, lambda: (floats(2, 20, 10),), 4, {"silu"}),
}
SPLIT_ALL = Recipe.model_validate(
    {
        "experts": {"method": "contiguous", "count": 4},
        "router": {"method": "avg_key", "top_k": "all", "weights": "one"},
    }
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_nobody_prepared_for(name: str) -> None:
    build, inputs, count, activations = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    located = upcycle.locate(model, inputs())
    found = [ffn for ffn in located.ffns if ffn.kind == "ffn"]
    assert len(found) == count
    assert {ffn.pointwise.name for ffn in found} == activations
    weights = [weight for ffn in found for weight in ffn.parameters]
    assert [weight for weight in weights if OTHERS.search(weight)] == []
    converted = upcycle.convert(model, SPLIT_ALL, inputs(), verify=False, located=located).model
    with torch.no_grad():
        expected = model(*inputs())
        assert (converted(*inputs()) - expected).abs().max() < RELATIVE * expected.abs().max()
