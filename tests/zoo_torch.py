"""Models without a library: torch.nn layers, and FFNs as people write them by hand."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from zoo import Case, D, H, MatmulMLP, Residual, mlp

from upcycle.capture.capture import ExampleInputs


def _sequence() -> ExampleInputs:
    return (torch.zeros(2, 7, D),)


def _two() -> ExampleInputs:
    return (torch.zeros(2, 7, D), torch.zeros(2, 5, D))


def _image() -> ExampleInputs:
    return (torch.zeros(2, 8, 5, 3),)


class Gated(nn.Module):
    """``w3(f(w1 x) * w2 x)``."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.w3 = nn.Linear(H, D, bias=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return self.w3(getattr(F, self.activation)(self.w1(x)) * self.w2(x))


class Parallel(nn.Module):
    """Attention and FFN read the same normalised input, and their sum is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), nn.MultiheadAttention(D, 4, batch_first=True)
        self.mlp = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0] + self.mlp(y)


class Macaron(nn.Module):
    """Half an FFN, attention, half an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(), mlp()
        self.attention = nn.MultiheadAttention(D, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = x + 0.5 * self.first(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + 0.5 * self.second(x)


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over the 7 tokens, one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.over_tokens, self.over_channels = mlp(7, 16, 7), mlp()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 7, D] -> [B, 7, D]."""
        x = x + self.over_tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm_channels(x))


class Einsum(nn.Module):
    """Raw weights in einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(D, H)), nn.Parameter(torch.zeros(H, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        hidden = F.relu(torch.einsum("bsd,dh->bsh", x, self.up)).square()
        return torch.einsum("bsh,hd->bsd", hidden, self.down)


class Pieces(nn.Module):
    """The expansion at one place of the model, the contraction at another."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H))
        self.out = nn.ModuleDict({"map": nn.Linear(H, D), "drop": nn.Dropout(0.1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return x + self.out["drop"](self.out["map"](F.mish(self.into(x))))


class ChannelsLast(nn.Module):
    """A depthwise convolution, and an FFN on channels that were moved last and back."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.mlp = nn.LayerNorm(8), mlp(8, 32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 8, H, W] -> same."""
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm(y)).permute(0, 3, 1, 2)


class FusedProjection(nn.Module):
    """One linear map gives queries, keys, values and the hidden tensor, in some order.

    ViT-22B and PaLM have a contraction of its own for the hidden tensor; a single-stream block of
    Flux maps it together with the attention's output.
    """

    def __init__(
        self, *, gated: bool = False, mlp_first: bool = False, joined: bool = False
    ) -> None:
        super().__init__()
        hidden = 2 * H if gated else H
        self.sizes = [hidden, D, D, D] if mlp_first else [D, D, D, hidden]
        self.gated, self.mlp_first, self.joined = gated, mlp_first, joined
        self.norm, self.into = nn.LayerNorm(D), nn.Linear(D, 3 * D + hidden)
        if joined:
            self.out = nn.Linear(D + H, D)
        else:
            self.attention_out, self.mlp_out = nn.Linear(D, D), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        parts = list(self.into(self.norm(x)).split(self.sizes, -1))
        hidden = parts.pop(0 if self.mlp_first else -1)
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        if self.joined:
            both = (hidden, attended) if self.mlp_first else (attended, hidden)
            return x + self.out(torch.cat(both, -1))
        return x + self.attention_out(attended) + self.mlp_out(hidden)


class Recurrent(nn.Module):
    """No FFN: a recurrent network with a linear map behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(D, H, batch_first=True), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return self.head(self.cell(x)[0])


class SubNorm(nn.Module):
    """A norm over the hidden axis: refused."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return x + self.down(self.norm(F.gelu(self.up(x))))


def _stack(block: Callable[[], nn.Module], times: int = 3) -> nn.Module:
    return nn.Sequential(*(block() for _ in range(times)))


def _transformer() -> nn.Module:
    return nn.Transformer(D, 4, 2, 2, H, batch_first=True)


def _pre_norm() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, H, activation="gelu", norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


TORCH: dict[str, Case] = {
    "torch_decoder": Case(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, H, batch_first=True), 3),
        3, "inline", "relu", _two, misses=0,
    ),
    "torch_pre_norm": Case(_pre_norm, 3, "inline", "gelu", _sequence, misses=0),
    "torch_transformer": Case(_transformer, 4, "inline", "relu", _two, misses=0),
    "hand_channels_last": Case(lambda: _stack(ChannelsLast), 3, "module", "gelu", _image, misses=0),
    "hand_conv1d": Case(
        lambda: Residual(nn.Sequential(nn.Conv1d(8, H, 1), nn.Hardswish(), nn.Conv1d(H, 8, 1))),
        1, "module", "hardswish", lambda: (torch.zeros(2, 8, 9),), misses=0,
    ),
    "hand_einsum": Case(lambda: Residual(Einsum()), 1, "module", "relu2", _sequence, misses=0),
    "hand_flux": Case(
        lambda: _stack(lambda: FusedProjection(joined=True)),
        3, "inline", "gelu_tanh", _sequence, misses=0,
    ),
    "hand_geglu": Case(lambda: Residual(Gated("gelu")), 1, "module", "geglu", _sequence, misses=0),
    "hand_glu": Case(
        lambda: Residual(nn.Sequential(nn.Linear(D, 2 * H), nn.GLU(), nn.Linear(H, D))),
        1, "module", "sigmoid_glu", _sequence, misses=0,
    ),
    "hand_macaron": Case(lambda: _stack(Macaron), 6, "module", "gelu", _sequence, misses=0),
    "hand_mixer": Case(lambda: _stack(Mixer), 6, "module", "gelu", _sequence, misses=0),
    "hand_palm": Case(
        lambda: _stack(lambda: FusedProjection(gated=True)),
        3, "inline", "swiglu", _sequence, misses=0,
    ),
    "hand_parallel": Case(lambda: _stack(Parallel), 3, "module", "gelu", _sequence, misses=0),
    "hand_pieces": Case(lambda: _stack(Pieces), 3, "siblings", "mish", _sequence, misses=0),
    "hand_recurrent": Case(Recurrent, 0, "", "", _sequence, misses=0),
    "hand_reglu": Case(lambda: Residual(Gated("relu")), 1, "module", "reglu", _sequence, misses=0),
    "hand_shared": Case(
        lambda: Residual(MatmulMLP(), times=3), 1, "module", "relu", _sequence, misses=0
    ),
    "hand_sub_norm": Case(lambda: _stack(SubNorm), 0, "", "", _sequence, misses=3),
    "hand_vit_22b": Case(
        lambda: _stack(FusedProjection), 3, "inline", "gelu_tanh", _sequence, misses=0
    ),
}  # fmt: skip
