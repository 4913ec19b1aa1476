"""Small modules with an FFN in them, for the zoo and for single tests."""

import torch
from torch import nn
from torch.nn import functional as F

D, H = 32, 64


class FunctionalMLP(nn.Module):
    """Raw weights, applied with F.linear; its own module."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2 * H if gated else H, D))
        self.down = nn.Parameter(torch.zeros(D, H))
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A plain FFN, or an interleaved GLU with gate and up swapped."""
        z = F.linear(x, self.up)
        hidden = z[..., 0::2] * F.silu(z[..., 1::2]) if self.gated else F.gelu(z)
        return F.linear(hidden, self.down)


class MatmulMLP(nn.Module):
    """``x @ W + b``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.zeros(D, H)), nn.Parameter(torch.zeros(H))
        self.w2, self.b2 = nn.Parameter(torch.zeros(H, D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A plain FFN."""
        return torch.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2


class FusedInline(nn.Module):
    """A layer that applies a fused gate_up inline, and cuts it at fixed sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.gate_up = nn.Linear(D, 2 * H)
        self.down = nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        gate, up = self.gate_up(self.norm(x)).split([H, H], -1)
        return x + self.down(F.silu(gate) * up)


class Residual(nn.Module):
    """``x + inner(x)``, `times` times with the same weights."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner = inner
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        for _ in range(self.times):
            x = x + self.inner(x)
        return x


class Places(nn.Module):
    """One MLP, registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MatmulMLP()
        self.second = nn.Sequential(nn.LayerNorm(D), self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        x = x + self.first(x)
        return x + self.second(x)


def mlp(d_in: int = D, d_ff: int = H, d_out: int = D) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(d_in, d_ff), nn.GELU(), nn.Linear(d_ff, d_out))
