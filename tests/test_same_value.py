"""A norm that is called twice gives two linear maps one input; what draws or writes does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upcycle

D, H = 16, 64


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class Twice(nn.Module):
    """``x + w3(tanh(w1(left(x))) * w2(right(x)))``."""

    def __init__(self, left: Callable[..., Any], right: Callable[..., Any]) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.w1, self.w2, self.w3 = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.tanh(self.w1(self.left(x)))
        return x + self.w3(gate * self.w2(self.right(x)))


def twice(norm: Callable[..., Any]) -> Twice:
    torch.manual_seed(0)
    return Twice(norm, norm)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(D),
        RMSNorm(),
        nn.BatchNorm1d(D),  # both calls are still made, so its statistics move as they did
        lambda x: x.float().clamp(-2, 2) / 3,
    ],
)
def test_a_norm_that_is_called_twice_is_one_input(norm: Callable[..., Any]) -> None:
    """The layer gets one of the two; outputs and gradients stay, up to the rounding of sums."""
    dense, x = twice(norm), torch.randn(7, D)
    (ffn,) = upcycle.locate(dense, (x,)).ffns
    assert (ffn.path, len(ffn.expansions)) == ("", 2)
    moe = upcycle.convert(dense, "sparse-upcycling", (x,)).model
    bound = H * torch.finfo(torch.float32).eps
    assert (moe(x) - dense(x)).abs().max() < bound * dense(x).abs().max()
    for model in (dense, moe):
        model(x).square().sum().backward()
    for name, parameter in dense.named_parameters():
        if "norm" in name or name.startswith("left"):
            other = moe.get_parameter(name)
            assert parameter.grad is not None
            assert other.grad is not None
            scale = parameter.grad.abs().max()
            assert (parameter.grad - other.grad).abs().max() < 4 * bound * scale


def count(x: torch.Tensor, calls: list[int]) -> torch.Tensor:
    calls.append(1)
    return x * len(calls)


DIFFER: dict[str, Callable[[], nn.Module]] = {
    "two norms": lambda: Twice(RMSNorm(), RMSNorm()),
    "two numbers": lambda: Twice(lambda x: x * 2, lambda x: x * 3),
    "two dimensions": lambda: Twice(lambda x: x.softmax(-1), lambda x: x.softmax(0)),
    "dropout": lambda: twice(nn.Dropout(0.1)),
    "dropout in evaluation": lambda: twice(nn.Dropout(0.1)).eval(),  # it may be trained later
    "dropout behind a norm": lambda: twice(nn.Sequential(nn.LayerNorm(D), nn.Dropout(0.1))),
    "dropout before a norm": lambda: twice(nn.Sequential(nn.Dropout(0.1), nn.LayerNorm(D))),
    "draws": lambda: twice(lambda x: x + torch.rand_like(x)),
    "calls": lambda: twice(lambda x, calls=[]: count(x, calls)),
}


@pytest.mark.parametrize("name", DIFFER)
def test_what_may_differ_is_not_one_input(name: str) -> None:
    found = upcycle.locate(DIFFER[name](), (torch.randn(7, D),))
    assert not found.ffns
    (miss,) = found.misses
    assert miss.reason.startswith("its linear maps read different inputs, `")
    assert "adapter" not in miss.reason


def test_a_change_in_place_between_the_two_is_seen() -> None:
    class Changed(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1
            gate = torch.tanh(self.w1(self.left(y)))
            y.add_(1)
            return x + self.w3(gate * self.w2(self.right(y)))

    found = upcycle.locate(Changed(F.relu, F.relu), (torch.randn(7, D),))
    assert not found.ffns


def test_a_dropout_of_zero_is_none() -> None:
    assert upcycle.locate(twice(nn.Dropout(0.0)), (torch.randn(7, D),)).ffns


def test_warnings_of_the_model_are_not_those_of_its_recording(
    recwarn: pytest.WarningsRecorder,
) -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(x, x.mean(0, keepdim=True), reduction="none")  # torch warns of the shapes

    assert upcycle.locate(twice(noisy), (torch.randn(7, D),)).misses
    assert not recwarn.list
