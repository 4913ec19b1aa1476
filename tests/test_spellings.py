"""More spellings of an FFN, each converted and compared, and what stays refused, and why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from numerics import assert_equal_up_to_rounding, bound
from test_locate import FFNLike, Raw, Wrapped, find, only, reason
from torch import nn
from torch.nn import functional as F

import upcycle
from upcycle.ir.weights import read_ffn
from upcycle.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

D, H = 8, 24
SPLIT_ALL = Recipe.model_validate(
    {
        "experts": {"method": "contiguous", "count": 5},
        "router": {"method": "avg_key", "top_k": "all", "weights": "one"},
    }
)


def check_split(inner: nn.Module, *shape: int) -> upcycle.Conversion:
    """Split it with all experts, and compare with the dense module within rounding."""
    model = zoo.drawn(zoo.Case(lambda: Wrapped(inner), 1, "", ""))
    x = torch.randn(*(shape or (2, 5, D)), generator=torch.Generator().manual_seed(0))
    done = upcycle.convert(model, SPLIT_ALL, (x,), overrides=[])
    (spec,) = done.plan.specs
    weights = read_ffn(spec.ffn, dict(model.named_parameters()))

    def rows(y: torch.Tensor) -> torch.Tensor:
        return y.movedim(spec.ffn.axis, -1).flatten(0, -2).detach()

    allowed = 2 * bound([weights], rows(x), torch.float32, experts=5)  # both are float32
    with torch.no_grad():
        assert_equal_up_to_rounding(rows(done.model(x)), rows(model(x)), allowed)
    return done


def where_leaky(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    return torch.where(z > 0, z, 0.1 * z)


def where_zeros(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    return torch.where(z.ge(0), z, torch.zeros_like(z))


def masked(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    return z.masked_fill(z < 0, 0.0)


def by_mask(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    return z * (z > 0)


def window(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    inside = (z > -1) & ~(z >= 1)
    return torch.where(inside | (z > 2), torch.expm1(z), torch.log1p(z.abs()) * inside.to(z.dtype))


POINTWISE = {
    "leaky": (where_leaky, "custom"),
    "zeros": (where_zeros, "relu"),
    "masked-fill": (masked, "relu"),
    "mask": (by_mask, "relu"),
    "window": (window, "custom"),
    "tensor": (
        lambda m, z, x: torch.where(z > 0, z, torch.tensor(0.0)),
        "relu",
    ),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_a_choice_is_pointwise(name: str) -> None:
    middle, activation = POINTWISE[name]
    assert only(FFNLike(middle)).pointwise.name == activation
    check_split(FFNLike(middle))


def test_arithmetic_on_truth_values_is_not_taken_for_one_on_numbers() -> None:
    twice = FFNLike(lambda m, z, x: z * ((z > 0) + (z > 1)))  # bool + bool is "or"
    assert find(twice).ffns == ()


def bmm(m: Any, x: torch.Tensor) -> torch.Tensor:
    up = torch.baddbmm(m.b1, x, m.w1[None].expand(len(x), -1, -1))
    gate, up = up.chunk(2, -1)
    return torch.bmm(F.gelu(gate) * up, m.w2.unsqueeze(0).expand(len(x), -1, -1)) + m.b2


def tensordot(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (torch.tensordot(x, m.w1, 1) + m.b1).chunk(2, -1)
    return torch.tensordot(F.gelu(gate) * up, m.w2, dims=([2], [0])) + m.b2


def einsum_swapped(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (torch.einsum("df,bsd->bsf", m.w1, x) + m.b1).chunk(2, -1)
    return torch.einsum("fd,...f->...d", m.w2, F.gelu(gate) * up) + m.b2


def einsum_channels(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (torch.einsum("bds,df->bfs", x, m.w1) + m.b1[:, None]).chunk(2, 1)
    return torch.einsum("bfs,fd->bds", F.gelu(gate) * up, m.w2)


@pytest.mark.parametrize("spelling", [bmm, tensordot, einsum_swapped, einsum_channels])
def test_linear_maps(spelling: Callable[..., torch.Tensor]) -> None:
    shape = (2, D, 5) if spelling is einsum_channels else (2, 5, D)
    ffn = only(Raw(spelling), *shape)
    assert (ffn.pointwise.name, ffn.d_ff) == ("geglu", H)
    assert ffn.axis == (1 if spelling is einsum_channels else -1)
    check_split(Raw(spelling), *shape)


def test_matrices_that_differ_from_batch_to_batch_are_no_linear_map() -> None:
    class Batched(nn.Module):
        """Each element of the batch has a matrix of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, D, H))
            self.down = nn.Linear(H, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.relu(torch.bmm(x, self.up)))

    assert find(Batched()).ffns == ()
    permuted = Raw(lambda m, x: F.relu(x @ m.w1[list(range(D))[::-1]]) @ m.w2.repeat(2, 1))
    assert find(permuted).ffns == ()


def normed(width: int = H) -> nn.Sequential:
    up, down = nn.Conv2d(D, width, 1), nn.Conv2d(width, D, 1)
    return nn.Sequential(up, nn.BatchNorm2d(width), nn.ReLU(), down)


def test_a_batch_norm_is_to_be_folded() -> None:
    model = normed()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    shape = (2, D, 4, 3)
    assert "over the batch in training: call `eval()`" in reason(model.train(), *shape)
    words = "`batch_norm` scales each neuron by numbers of its own: fold it into the map before it"
    assert words in reason(model.eval(), *shape)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    check_split(nn.Sequential(folded, *model[2:]), *shape)


def test_groups_and_kernels_are_told_apart() -> None:
    def pair(**options: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(D, H, **options), nn.ReLU(), nn.Conv2d(H, D, 1))

    assert "groups would be mostly zeros" in reason(pair(kernel_size=1, groups=2), 2, D, 4, 3)
    assert "has a kernel larger than one" in reason(pair(kernel_size=3, padding=1), 2, D, 4, 3)


def test_parameters_of_the_nonlinearity_are_named() -> None:
    ia3 = FFNLike(lambda m, z, x: F.gelu(z) * m.ia3, ia3=nn.Parameter(torch.ones(H)))
    assert "its nonlinearity has a parameter of its own (`inner.ia3`)" in reason(ia3)
    each = nn.Sequential(nn.Linear(D, H), nn.PReLU(1), nn.Linear(H, D))
    assert "its nonlinearity has a parameter of its own (`inner.1.weight`)" in reason(each)


def test_an_operation_that_no_rule_knows_is_tried_out() -> None:
    bessel = FFNLike(lambda m, z, x: torch.special.i0(z))
    assert "`special_i0` seems to be pointwise, but no converted model could store" in reason(
        bessel
    )
    rolled = FFNLike(lambda m, z, x: torch.fft.fftshift(F.relu(z), -1))
    assert "`fft_fftshift` is not pointwise: an element that was moved moved" in reason(rolled)
    drawn = FFNLike(lambda m, z, x: torch.rrelu(z, training=True))
    assert "`rrelu` is not known to be pointwise" in reason(drawn)


def test_a_function_of_its_own_is_seen_through() -> None:
    class Swish(torch.autograd.Function):
        """An activation with a gradient written by hand."""

        @staticmethod
        def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(z)
            return z * torch.sigmoid(z)

    by_hand = FFNLike(lambda m, z, x: Swish.apply(z))
    assert only(by_hand).pointwise.name == "silu"
    check_split(FFNLike(lambda m, z, x: Swish.apply(z)))


def test_a_norm_over_positions_is_not_said_to_be_one_over_neurons() -> None:
    over_space = FFNLike(lambda m, z, x: F.relu(z) / F.relu(z).norm(dim=1, keepdim=True))
    assert "`norm` mixes positions" in reason(over_space)
    over_neurons = FFNLike(lambda m, z, x: F.relu(z) / F.relu(z).norm(dim=-1, keepdim=True))
    assert "`norm` mixes the hidden axis" in reason(over_neurons)
