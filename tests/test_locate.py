"""Locate: every FFN of the zoo, every spelling that is one, and why the others are none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from numerics import assert_equal_up_to_rounding, bound
from torch import nn
from torch.nn import functional as F

import upcycle
import upcycle.ir.weights
from upcycle.capture.capture import capture
from upcycle.capture.recorder import op_name
from upcycle.ir.ffn import FFN, Located
from upcycle.passes.locate.hidden_tensor import NotAnFFNError
from upcycle.passes.locate.locate import locate
from upcycle.passes.locate.trace import trace

pytestmark = pytest.mark.usefixtures("one_thread")

D, H = 8, 24


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_ffn_of_the_zoo_is_found(name: str) -> None:
    case = zoo.ZOO[name]
    found = upcycle.locate(zoo.model(name), case.example() if case.example else None)
    ffns = [ffn for ffn in found.ffns if ffn.kind == "ffn"]
    assert len(ffns) == case.ffns
    assert {ffn.placement for ffn in ffns} == {case.placement}
    assert {ffn.pointwise.name for ffn in ffns} == {case.activation}
    assert len({ffn.path for ffn in found.ffns}) == len(found.ffns)
    for ffn in ffns:
        tensors = ("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "embed", "pool")
        assert not any(word in name for name in ffn.parameters for word in tensors)
    heads = [ffn.path for ffn in found.ffns if ffn.kind != "ffn"]
    assert heads == (["classifier"] if name == "roberta" else [])
    misses = [miss.path for miss in found.misses]
    assert misses == (["cls.predictions.decoder"] if name == "bert" else [])


class FFNLike(nn.Module):
    """``down(middle(up(x)))``, where `middle` also gets the module and x."""

    def __init__(
        self, middle: Callable[..., torch.Tensor], *, rows: int = H, columns: int = H, **more: Any
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, rows), nn.Linear(columns, D)
        self.middle = middle
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> Any:
        """x [B, S, D] -> [B, S, D]."""
        z = self.up(x)
        return self.down(self.middle(self, z, x))


class Wrapped(nn.Module):
    """Puts a module into a model, so that it can be swapped."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        """As the inner module."""
        return self.inner(*args)


def find(inner: nn.Module, *shape: int) -> Located:
    return upcycle.locate(Wrapped(inner), (torch.zeros(*(shape or (2, 5, D))),))


def only(inner: nn.Module, *shape: int) -> FFN:
    found = find(inner, *shape)
    assert not found.misses
    (ffn,) = found.ffns
    return ffn


def reason(inner: nn.Module, *shape: int) -> str:
    found = find(inner, *shape)
    assert found.ffns == ()
    (miss,) = found.misses
    return miss.reason


def chunked(act_first: bool) -> Callable[..., torch.Tensor]:
    def middle(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
        a, b = (F.silu(z) if act_first else z).chunk(2, -1)
        return a * b if act_first else F.silu(a) * b

    return middle


def by_hand(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    return z * (1 / (1 + torch.exp(-z)))


def in_place(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    z = F.relu(z, inplace=True)
    z *= 2
    return z.mul_(0.5)


def half_and_back(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    return F.gelu(z.float()).to(z.dtype)


ACCEPTED: dict[str, tuple[FFNLike, str]] = {
    "gelu": (FFNLike(lambda m, z, x: F.gelu(z)), "gelu"),
    "keyword": (FFNLike(lambda m, z, x: F.gelu(input=z)), "gelu"),
    "one-minus": (FFNLike(lambda m, z, x: z * (1 - torch.sigmoid(-z))), "silu"),
    "by-hand": (FFNLike(by_hand), "silu"),
    "power-of-two": (FFNLike(lambda m, z, x: 2**z), "custom"),
    "in-place": (FFNLike(in_place), "relu"),
    "dropout": (FFNLike(lambda m, z, x: F.dropout(F.relu(z), 0.3, m.training)), "relu"),
    "chunk": (FFNLike(chunked(False), rows=2 * H), "swiglu"),
    "act-before-chunk": (FFNLike(chunked(True), rows=2 * H), "custom"),
    "interleaved": (
        FFNLike(lambda m, z, x: F.gelu(z[..., ::2]) * z[..., 1::2], rows=2 * H),
        "geglu",
    ),
    "swapped": (FFNLike(lambda m, z, x: z[..., :H] * F.silu(z[..., H:]), rows=2 * H), "swiglu"),
    "glu": (FFNLike(lambda m, z, x: F.glu(z, -1), rows=2 * H), "sigmoid_glu"),
    "heads": (
        FFNLike(
            lambda m, z, x: F.silu(z.view(2, 5, 4, 6).transpose(1, 2)).transpose(1, 2).flatten(2)
        ),
        "silu",
    ),
    "addcmul": (
        FFNLike(
            lambda m, z, x: torch.addcmul(z[..., :H], F.silu(z[..., :H]), z[..., H:], value=0.5),
            rows=2 * H,
        ),
        "custom",
    ),
    "reshape-as": (FFNLike(lambda m, z, x: F.relu(z.flatten(0, 1)).reshape_as(z)), "relu"),
    "no-op-cast": (FFNLike(lambda m, z, x: F.relu(z.to(z.dtype)).float()), "relu"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_spellings_of_an_ffn(name: str) -> None:
    module, activation = ACCEPTED[name]
    ffn = only(module)
    assert ffn.pointwise.name == activation
    assert (ffn.placement, ffn.d_model, ffn.d_ff, ffn.d_out) == ("module", D, H, D)
    x = torch.randn(2, 5, D)
    weights = upcycle.ir.weights.read_ffn(ffn, dict(Wrapped(module).named_parameters()))
    with torch.no_grad():
        gap = (weights(x) - module.eval()(x)).abs().max()
    assert gap < 1e-6
    assert ffn.hidden_dropout == (0.3 if name == "dropout" else 0.0)


def test_a_gate_is_expansion_zero() -> None:
    assert [p.rows for p in only(ACCEPTED["chunk"][0]).expansions] == [(0, H, 1), (H, 2 * H, 1)]
    assert [p.rows for p in only(ACCEPTED["swapped"][0]).expansions] == [(H, 2 * H, 1), (0, H, 1)]
    rows = [p.rows for p in only(ACCEPTED["interleaved"][0]).expansions]
    assert rows == [(0, 2 * H - 1, 2), (1, 2 * H, 2)]


def test_a_float32_activation_in_a_bfloat16_model_follows_the_model() -> None:
    ffn = upcycle.locate(
        Wrapped(FFNLike(half_and_back).bfloat16()), (torch.zeros(2, D, dtype=torch.bfloat16),)
    ).ffns[0]
    assert ffn.pointwise.name == "gelu"
    assert [op for op, _, _ in ffn.pointwise.steps] == ["cast", "gelu", "cast_like"]
    assert ffn.pointwise(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


class Raw(nn.Module):
    """Weights as parameters, applied in one of several spellings."""

    def __init__(self, apply: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(D, 2 * H)), nn.Parameter(torch.randn(2 * H))
        self.w2, self.b2 = nn.Parameter(torch.randn(H, D)), nn.Parameter(torch.randn(D))
        self.apply_ = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return self.apply_(self, x)


def bias_then_chunk(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ m.w1 + m.b1).chunk(2, -1)
    return (F.silu(gate) * up) @ m.w2 + m.b2


def chunk_then_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ m.w1).chunk(2, -1)
    return (F.silu(gate + m.b1[:H]) * (up + m.b1[H:])) @ m.w2 + m.b2


def with_einsum(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (torch.einsum("bsd,df->bsf", x, m.w1) + m.b1.view(1, 1, -1)).chunk(2, -1)
    return torch.einsum("...f,fd->...d", F.silu(gate) * up, m.w2) + m.b2


@pytest.mark.parametrize("spelling", [bias_then_chunk, chunk_then_bias, with_einsum])
def test_raw_weights_with_biases_of_their_own(spelling: Any) -> None:
    module = Raw(spelling)
    ffn = only(module)
    assert ffn.pointwise.name == "swiglu"
    assert ffn.parameters == ("inner.w1", "inner.w2", "inner.b1", "inner.b2")
    x = torch.randn(2, 5, D)
    weights = upcycle.ir.weights.read_ffn(ffn, dict(Wrapped(module).named_parameters()))
    # Both are computed in float32, so each may be off by the bound.
    assert_equal_up_to_rounding(
        weights(x).flatten(0, 1),
        module(x).flatten(0, 1).detach(),
        2 * bound([weights], x.flatten(0, 1), torch.float32),
    )


def test_raw_weights_of_the_model_itself_say_what_to_do() -> None:
    (miss,) = upcycle.locate(Raw(bias_then_chunk), (torch.zeros(2, D),)).misses
    assert "raw parameters of the model itself: put it into a parent" in miss.reason
    inline = Raw(lambda m, x: x + bias_then_chunk(m, x))
    assert "`inner` applies its weights `inner.w1` and `inner.w2` among" in reason(inline)


class LikeHidden(FFNLike):
    """Gives x the shape of the hidden tensor, whose numbers are not read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        hidden = F.relu(self.up(x))
        return self.down(hidden) + x.repeat(1, 1, H // D).view_as(hidden)[..., :D]


class Returns(FFNLike):
    """Returns its hidden tensor, too."""

    def forward(self, x: torch.Tensor) -> Any:
        """A pair."""
        hidden = F.relu(self.up(x))
        return self.down(hidden), hidden


class Reads(FFNLike):
    """Another linear map reads the hidden tensor."""

    def forward(self, x: torch.Tensor) -> Any:
        """Same shape in and out."""
        hidden = F.relu(self.up(x))
        return self.down(hidden) + self.other(hidden)


class Lora(FFNLike):
    """A low-rank adapter beside the expansion."""

    def forward(self, x: torch.Tensor) -> Any:
        """Same shape in and out."""
        return self.down(F.relu(self.up(x) + self.b(self.a(x))))


class Tied(nn.Module):
    """``W^T relu(W x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return F.linear(F.relu(self.up(x)), self.up.weight.t())


def rms(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    h = F.silu(z)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def global_response_norm(m: Any, z: torch.Tensor, _: Any) -> torch.Tensor:
    h = F.relu(z)
    energy = h.norm(p=2, dim=1, keepdim=True)
    ratio = energy / (energy.mean(-1, keepdim=True) + 1e-6)
    return h + torch.addcmul(m.bias.view(1, 1, -1), m.weight.view(1, 1, -1), h * ratio)


def batch_norm_between_views(m: Any, z: torch.Tensor, _: Any) -> torch.Tensor:
    return F.hardswish(m.norm(z.flatten(0, 1)).reshape_as(z))


def write_through_view(_: Any, z: torch.Tensor, __: Any) -> torch.Tensor:
    h = F.relu(z)
    h[..., :4].copy_(h[..., 4:8].flip(-1))
    return h


def with_and_without(m: Any, x: torch.Tensor) -> torch.Tensor:
    z = (x @ m.w1)[..., :H]
    return (F.relu(z + m.b1[:H]) * z) @ m.w2


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "layer-norm": (
        FFNLike(lambda m, z, x: m.norm(F.gelu(z)), norm=nn.LayerNorm(H)),
        "`layer_norm` mixes the hidden axis",
    ),
    "rms-norm": (FFNLike(rms), "`mean` mixes the hidden axis"),
    "global-response-norm": (
        FFNLike(
            global_response_norm,
            bias=nn.Parameter(torch.zeros(H)),
            weight=nn.Parameter(torch.zeros(H)),
        ),
        "`norm` mixes positions",
    ),
    "batch-norm": (
        FFNLike(batch_norm_between_views, norm=nn.BatchNorm1d(H).eval()),
        "`batch_norm` scales each neuron by numbers of its own",
    ),
    "softmax": (FFNLike(lambda m, z, x: F.softmax(z, -1)), "`softmax` mixes the hidden axis"),
    "sort": (FFNLike(lambda m, z, x: F.relu(z).sort(-1)[0]), "`sort` mixes the hidden axis"),
    "cumsum": (FFNLike(lambda m, z, x: F.relu(z).cumsum(-1)), "`cumsum` mixes the hidden axis"),
    "prelu": (
        FFNLike(lambda m, z, x: F.prelu(z, m.slope), slope=nn.Parameter(torch.ones(1))),
        "its nonlinearity has a parameter of its own (`inner.slope`)",
    ),
    "scale": (
        FFNLike(lambda m, z, x: F.relu(z) * m.scale, scale=nn.Parameter(torch.ones(H))),
        "its nonlinearity has a parameter of its own (`inner.scale`)",
    ),
    "scale-of-two": (
        FFNLike(
            lambda m, z, x: F.relu(z) * (m.s + m.t),
            s=nn.Parameter(torch.ones(H)),
            t=nn.Parameter(torch.ones(H)),
        ),
        "its nonlinearity has a parameter of its own (`inner.s`)",
    ),
    "returned": (Returns(F.relu), "its hidden tensor is also an output of the model"),
    "read": (
        Reads(F.relu, other=nn.Linear(H, D, bias=False)),
        "its hidden tensor is also read by `linear` in `inner.",
    ),
    "adapter": (
        Lora(F.relu, a=nn.Linear(D, 2), b=nn.Linear(2, H)),
        "its linear maps read different inputs, `input_0` and `linear_1` (a low-rank adapter on an",
    ),
    "tied": (Tied(), "its contraction and an expansion are one weight"),
    "mixed": (
        FFNLike(lambda m, z, x: F.relu(z).transpose(1, 2).reshape(2, 5, H)),
        "positions and neurons are mixed before the contraction",
    ),
    "reordered": (
        FFNLike(lambda m, z, x: F.relu(z).flip(1)),
        "positions are reordered before the contraction",
    ),
    "irregular": (
        FFNLike(lambda m, z, x: F.relu(z).roll(3, -1)),
        "its neurons are not stored in one regular order",
    ),
    "bias-here-and-there": (Raw(with_and_without), "with and without the bias `inner.b1`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_looks_like_an_ffn_is_refused_with_the_reason(name: str) -> None:
    module, words = REFUSED[name]
    found = find(module)
    assert found.ffns == ()
    assert any(words in miss.reason for miss in found.misses), found.misses


def test_the_shape_of_a_hidden_tensor_may_be_read() -> None:
    assert only(LikeHidden(F.relu)).pointwise.name == "relu"


class Absent(nn.Module):
    """Two FFNs; the second is given no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = FFNLike(lambda m, z, x: F.relu(z)), FFNLike(lambda m, z, x: z)
        self.unused.middle = self.used.middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        return torch.cat([self.used(x), self.unused(x[:0])])


def test_an_ffn_that_the_example_gives_no_data_is_told_once() -> None:
    found = find(Absent())
    assert [ffn.path for ffn in found.ffns] == ["inner.used"]
    (miss,) = found.misses
    assert miss.path == "inner.unused.down"
    assert "no data reaches it with these example inputs" in miss.reason


class Stream(nn.Module):
    """Blocks that add to a residual stream, with a norm and a scale between."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FFNLike(lambda m, z, x: F.relu(z)) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(D))
        self.stem = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = self.stem(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x)) * self.scale
        return x


def test_a_walk_does_not_follow_the_residual_stream_to_its_start() -> None:
    program = capture(Stream(12), (torch.zeros(2, 5, D),), repeat_blocks=False)
    last = [node for node in program.graph.nodes if op_name(node.target) == "layer_norm"][-1]
    with pytest.raises(NotAnFFNError, match="residual stream"):
        trace(last, -1)
    assert len(locate(program).ffns) == 12


def test_an_index_that_is_a_tensor_ends_the_walk() -> None:
    def chosen(_: Any, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.relu(z)[torch.arange(2), x.argmax(1)[:, 0]]

    assert find(FFNLike(chosen)) == Located()


def test_a_write_through_a_view_is_seen() -> None:
    assert find(FFNLike(write_through_view)).ffns == ()


@pytest.mark.parametrize(
    "module",
    [
        FFNLike(lambda m, z, x: z),
        FFNLike(lambda m, z, x: z * 3 + 1),
        nn.Sequential(nn.Linear(D, 2), nn.RMSNorm(2), nn.Linear(2, D)),
        nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D)),
        nn.MultiheadAttention(D, 2),
    ],
    ids=["identity", "affine", "low-rank-rms", "norm", "attention"],
)
def test_linear_pairs_and_attention_are_not_mentioned(module: nn.Module) -> None:
    if isinstance(module, nn.MultiheadAttention):
        found = upcycle.locate(module, tuple(torch.zeros(2, 5, D) for _ in range(3)))
    else:
        found = find(module)
    assert found == Located()


def test_convolutions() -> None:
    def pair(kernel: int, **more: Any) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(D, H, kernel, padding="same", **more), nn.ReLU(), nn.Conv2d(H, D, 1)
        )

    assert only(pair(1), 2, D, 4, 3).axis == 1
    assert "kernel larger than one" in reason(pair(3), 2, D, 4, 3)
    assert "groups" in reason(pair(1, groups=2), 2, D, 4, 3)
    depthwise = nn.Sequential(
        nn.Conv1d(D, H, 1), nn.Conv1d(H, H, 3, padding=1, groups=H), nn.GELU(), nn.Conv1d(H, D, 1)
    )
    assert "`conv1d` has a kernel larger than one" in reason(depthwise, 2, D, 6)
    assert find(pair(1), D, 4, 3).ffns == ()  # without a batch the channels are another axis


def test_a_weight_that_the_forward_computes_is_to_be_materialised() -> None:
    model = zoo.mlp(D, H, D)
    for i in (0, 2):
        torch.nn.utils.parametrizations.weight_norm(model[i])
        assert "computed in the forward (weight norm" in reason(model)
        if i == 0:
            torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert only(model).d_ff == H


def test_weights_tied_to_something_else() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(H, D)
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
            self.up.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return x + self.down(F.relu(self.up(x)))

    (miss,) = upcycle.locate(Embedded(), (torch.zeros(2, 5, dtype=torch.long),)).misses
    assert "read by `embedding` in `embed`: untie" in miss.reason
    two = nn.Sequential(zoo.mlp(), zoo.mlp())
    two[1][0].weight = two[0][0].weight
    found = upcycle.locate(two, (torch.zeros(2, zoo.D),))
    assert found.ffns == ()
    assert [(miss.path, miss.reason) for miss in found.misses] == [
        ("1.2", "it shares a weight with the FFN `0`"),
        ("0", "its weight `0.0.weight` is also read by `linear` in `1.0`: untie them first"),
    ]
    square = nn.Sequential(zoo.mlp(8, 8, 8))
    square[0][2].weight = square[0][0].weight
    (miss,) = upcycle.locate(square, (torch.zeros(2, 8),)).misses
    assert "one weight: untie" in miss.reason


def test_weights_shared_with_a_block_that_was_not_recorded() -> None:
    blocks = nn.Sequential(*(nn.Sequential(zoo.mlp()) for _ in range(5)))
    blocks[4][0][2].weight = blocks[3][0][2].weight
    found = upcycle.locate(blocks, (torch.zeros(2, zoo.D),))
    assert [ffn.path for ffn in found.ffns] == ["0.0", "1.0", "2.0"]
    assert found.misses


def test_a_mixture_of_experts_is_one_already() -> None:
    sizes = {**zoo.SIZES, **zoo.TOKENS, **zoo.GROUPED, "num_hidden_layers": 3}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)).eval()
    found = upcycle.locate(model)
    assert found.ffns == ()
    assert [miss.path for miss in found.misses] == [
        f"model.layers.{i}.mlp.experts" for i in range(3)
    ]
    assert {miss.reason for miss in found.misses} == {"it is already a mixture of experts"}


def test_a_converted_model_has_no_more_ffns() -> None:
    dense = zoo.model("llama")
    converted = upcycle.convert(dense, "sparse-upcycling", verify=False).model
    assert upcycle.locate(converted).ffns == ()


def test_kinds() -> None:
    def kind(d_in: int, d_ff: int, d_out: int) -> str:
        return only(zoo.mlp(d_in, d_ff, d_out), 3, d_in).kind

    assert kind(8, 32, 8) == "ffn"
    assert kind(8, 8, 8) == "ffn"
    assert kind(8, 16, 3) == "ffn"
    assert kind(8, 2, 8) == "bottleneck"
    assert kind(8, 8, 3) == "head"
    assert kind(32, 16, 10) == "head"


def test_overlapping_ffns_leave_the_larger_and_tell_of_the_other() -> None:
    chain = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    found = upcycle.locate(chain, (torch.zeros(2, 8),))
    assert [(ffn.d_model, ffn.d_ff) for ffn in found.ffns] == [(8, 64)]
    (miss,) = found.misses
    assert miss.reason == "it shares a weight with the FFN `2`"


def test_ffns_that_reach_from_block_to_block_have_paths_of_their_own() -> None:
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)))
    found = upcycle.locate(chain, (torch.zeros(2, 8),))
    assert [ffn.path for ffn in found.ffns] == ["1.0", "3.0", "5.0"]


def test_output_dropout_belongs_to_the_module_that_applies_it() -> None:
    gpt2 = upcycle.locate(zoo.model("gpt2")).ffns[0]
    assert (gpt2.hidden_dropout, gpt2.output_dropout) == (0.0, 0.1)
    t5 = upcycle.locate(zoo.model("t5")).ffns[0]  # its layer drops out after the module
    assert (t5.hidden_dropout, t5.output_dropout) == (0.1, 0.0)
    opt = upcycle.locate(zoo.model("encoder")).ffns[0]
    assert (opt.hidden_dropout, opt.output_dropout) == (0.1, 0.0)
