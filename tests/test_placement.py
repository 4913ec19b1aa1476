"""Where a layer is put: the converted model runs wherever the dense one did, and computes that.

Splits with all experts are exact: sums of 64 products in another order, in float32. Each sum errs
by at most 64 eps = 7.6e-6 of its terms' magnitudes; `same` allows that, of the largest output.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

import upcycle
from upcycle.ir.ffn import Located
from upcycle.layers.moe import MoE
from upcycle.layers.tap import Tap

pytestmark = pytest.mark.usefixtures("one_thread")

D, H = 8, 32
ALLOWED = 64 * torch.finfo(torch.float32).eps


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.down(F.relu(self.up(x)))


class Model(nn.Module):
    """Does something with an FFN."""

    def __init__(self, run: Callable[..., torch.Tensor], ffn: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(D), ffn or FFN()
        self.run = run

    def forward(self, *given: Any) -> torch.Tensor:
        return self.run(self, *given)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (2, 5)), D, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, *inputs: Any) -> nn.Module:
    return upcycle.convert(
        model, "split-all", inputs, verify=False, overrides=["experts.count=4"]
    ).model


def same(model: nn.Module, *inputs: Any) -> Located:
    """Without verification the converted model computes what the dense one does."""
    model.eval()
    located = upcycle.locate(model, inputs)
    assert located.ffns
    with torch.no_grad():
        expected = model(*inputs)
        actual = converted(model, *inputs)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ALLOWED * expected.abs().max().item())
    return located


def placements(located: Located) -> list[str]:
    return [ffn.placement for ffn in located.ffns]


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x + m.ffn(m.norm(x), None),
        lambda m, x: x + m.ffn(m.norm(x), reverse=False),
        lambda m, x: x + m.ffn(x=m.norm(x)),
        lambda m, x: m.ffn(m.norm(x).to(m.ffn.up.weight.dtype)),
        lambda m, x: m.ffn(m.norm(x)) + len(list(m.ffn.up.children())),
    ],
)
def test_a_module_of_which_more_is_asked_than_one_tensor_is_not_replaced(
    run: Callable[..., torch.Tensor],
) -> None:
    assert placements(same(Model(run), tokens())) == ["inline"]


def test_a_module_that_maps_one_tensor_is_replaced() -> None:
    assert placements(same(Model(lambda m, x: x + m.ffn(m.norm(x))), tokens())) == ["module"]


class Depends(FFN):
    """Twice as much for long texts."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        y = super().forward(x)
        return y if x.shape[1] < 6 else 2 * y


def test_every_call_of_a_module_decides_whether_it_is_an_ffn() -> None:
    def run(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return m.ffn(x).sum(1) + m.ffn(y).sum(1)

    assert placements(same(Model(run, Depends()), tokens(2, 4), tokens(2, 7))) == ["inline"]
    assert placements(same(Model(run), tokens(2, 4), tokens(2, 7))) == ["module"]


class Counts(FFN):
    """Its forward leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(D))

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.calls += 1
        self.seen += x.mean((0, 1))
        return super().forward(x)


def test_a_module_that_changes_itself_goes_on_doing_it() -> None:
    model = Model(lambda m, x: m.ffn(x), Counts()).eval()
    x = tokens()
    result: Any = converted(model, x)
    with torch.no_grad():
        result(x)
    assert (result.ffn.calls, model.ffn.calls) == (1, 0)
    assert torch.equal(result.ffn.seen, x.mean((0, 1)))
    assert not model.ffn.seen.any()


class Widened(FFN):
    """Gives x the shape of the hidden tensor."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        z = self.up(x)
        wide = x.repeat(1, 1, H // D).view(z.shape)
        return self.down(F.relu(z)) + wide[..., :D]


def test_a_hidden_tensor_whose_width_is_needed_keeps_it() -> None:
    same(Model(lambda m, x: m.ffn(x), Widened()), tokens())
    model = converted(Model(lambda m, x: m.ffn(x), Widened()).eval(), tokens())
    assert [m.width for m in model.modules() if isinstance(m, Tap)] == [H]


def test_an_ffn_without_whose_module_the_model_does_not_run_is_refused_by_name() -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.ffn.up.in_features + m.ffn.down.in_features
        return m.ffn(x)

    located = upcycle.locate(Model(run), (tokens(),))
    assert located.ffns == ()
    (miss,) = located.misses
    assert miss.path == "ffn"
    assert "without its modules the model does not run (AttributeError" in miss.reason


HOOKS: dict[str, Callable[[Any], Any]] = {
    "output of the module": lambda m: m.ffn.register_forward_hook(lambda _, i, o: 3 * o + 1),
    "input of the module": lambda m: m.ffn.register_forward_pre_hook(lambda _, i: (2 * i[0],)),
    "with keywords": lambda m: m.ffn.register_forward_hook(
        lambda _, i, k, o: o - i[0], with_kwargs=True
    ),
    "output of the expansion": lambda m: m.ffn.up.register_forward_hook(lambda _, i, o: 2 * o),
    "input of the expansion": lambda m: m.ffn.up.register_forward_pre_hook(
        lambda _, i: (2 * i[0],)
    ),
    "output of the contraction": lambda m: m.ffn.down.register_forward_hook(lambda _, i, o: 2 * o),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_stay(hook: str) -> None:
    model = Model(lambda m, x: x + m.ffn(m.norm(x)))
    with torch.no_grad():
        plain = model(tokens())
        HOOKS[hook](model)
        assert not torch.allclose(model(tokens()), plain)
    same(model, tokens())


def test_a_hook_that_only_looks_sees_the_layer() -> None:
    seen: list[nn.Module] = []
    model = Model(lambda m, x: m.ffn(x)).eval()
    model.ffn.register_forward_hook(lambda module, _, __: seen.append(module))
    result = converted(model, tokens())
    seen.clear()
    with torch.no_grad():
        result(tokens())
    assert [type(module) for module in seen] == [MoE]


class Dense(nn.Linear):
    """A linear layer with its activation."""

    def __init__(self, d_in: int, d_out: int, act: Callable[..., torch.Tensor] | None) -> None:
        super().__init__(d_in, d_out)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return self.act(y) if self.act else y


class ActsFirst(Dense):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(x), self.weight, self.bias)


class Adds(Dense):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + 1


@pytest.mark.parametrize("act", [F.silu, torch.sin, lambda z: F.relu(z) * 0.5])
def test_a_module_may_apply_a_linear_map_and_what_is_pointwise(act: Any) -> None:
    located = same(nn.Sequential(Dense(D, H, act), Dense(H, D, None)), tokens())
    assert [(ffn.path, ffn.placement) for ffn in located.ffns] == [("", "inline")]
    same(nn.Sequential(nn.Linear(D, H), ActsFirst(H, D, None)), tokens())
    (miss,) = upcycle.locate(nn.Sequential(Dense(D, H, act), Adds(H, D, None)), (tokens(),)).misses
    assert miss.reason.startswith("`1` applies its weights `0.weight` and")


def test_dropout_in_the_module_of_a_contraction_is_kept() -> None:
    class Drops(Dense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.25, self.training)

    (ffn,) = upcycle.locate(nn.Sequential(Dense(D, H, F.silu), Drops(H, D, None)), (tokens(),)).ffns
    assert ffn.output_dropout == 0.25


def two_activations(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.ffn.down(F.relu(m.ffn.up(x))) + m.ffn.down(F.silu(m.ffn.up(x)))


def two_scales(m: Any, x: torch.Tensor) -> torch.Tensor:
    for i in range(1, 3):
        x = x + m.ffn.down(F.relu(m.ffn.up(x)) / i)
    return x


def out_of_turn(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = m.ffn.up(x), m.ffn.up(x + 1)
    return m.ffn.down(F.relu(a)) * m.ffn.down(F.relu(b))


def changed_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.norm(x)
    z = m.ffn.up(x)
    x.view(-1).add_(1.5)
    return x * m.ffn.down(F.relu(z))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (two_activations, "applied with two activations, or two scales"),
        (two_scales, "applied with two activations, or two scales"),
        (out_of_turn, "runs several times before its contraction does"),
        (changed_between, "`add` changes its input in place before its contraction"),
    ],
)
def test_uses_that_one_layer_could_not_serve_are_refused(
    run: Callable[..., torch.Tensor], words: str
) -> None:
    located = upcycle.locate(Model(run), (tokens(),))
    assert located.ffns == ()
    assert any(words in miss.reason for miss in located.misses)


def test_uses_in_turn_are_one_ffn() -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + m.ffn.down(F.relu(m.ffn.up(x)))
            x += 0.5
        return x

    assert placements(same(Model(run), tokens())) == ["inline"]


def test_what_has_no_copy_is_shared() -> None:
    model: Any = Model(lambda m, x: m.helper(m.ffn(x)))
    model.helper = staticmethod(torch.relu)
    model.ffn.lock = model.table = {"lock": threading.Lock()}
    model.cached = model.ffn.up.weight * 2  # the result of a computation
    same(model, tokens())
    result: Any = converted(model, tokens())
    assert result.helper is model.helper
    assert result.table is not model.table
    assert result.table["lock"] is model.table["lock"]


def test_a_module_that_refuses_to_be_copied_is_named() -> None:
    class Refuses(FFN):
        def __deepcopy__(self, _: object) -> None:
            raise TypeError("one of a kind")

    model = Model(lambda m, x: m.ffn(x), Refuses()).eval()
    with pytest.raises(upcycle.UnsupportedError, match=r"`ffn` cannot be copied \(one of a kind"):
        converted(model, tokens())


class More(Model):
    """Its state dict holds more than tensors."""

    def get_extra_state(self) -> object:
        return {"width": D}

    def set_extra_state(self, state: object) -> None:
        assert state == {"width": D}


def test_a_state_dict_may_hold_more_than_tensors(tmp_path: Any) -> None:
    model = More(lambda m, x: x + m.ffn(x)).eval()
    done = upcycle.convert(model, "split-all", (tokens(),), overrides=["experts.count=4"])
    done.save(tmp_path / "out")
    loaded = upcycle.load(tmp_path / "out", model=More(model.run)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()), done.model(tokens()))
    other = More(model.run)
    other.norm = nn.Identity()
    with pytest.raises(upcycle.UsageError, match="its weights are not those"):
        upcycle.load(tmp_path / "out", model=other)


def test_no_file_holds_hooks(tmp_path: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = hf.LlamaForCausalLM(config).eval()
    mlp = model.model.layers[0].mlp
    for factor, words in ((1.0, ""), (2.0, r"no file holds the hooks on `model.layers.0.mlp`")):
        handle = mlp.register_forward_hook(lambda _, __, out, factor=factor: factor * out)
        done = upcycle.convert(model, "split-all", overrides=["experts.count=4"])
        if words:
            with pytest.raises(upcycle.VerificationError, match=words):
                done.save(tmp_path / "doubled")
        else:
            done.save(tmp_path / "same")
        handle.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
