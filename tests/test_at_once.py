"""Router and experts in one call, for few tokens: the same as one after the other."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_case import made
from torch import nn

from upcycle.kernels import torch_cpu as expert_kernels
from upcycle.kernels import weights_of
from upcycle.kernels.compiled import library, run_compiled, run_routed
from upcycle.layers import moe
from upcycle.layers.config import LayerConfig
from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE, all_experts
from upcycle.layers.router import Router

pytestmark = pytest.mark.skipif(library() is None, reason="no GCC 12 or Clang")
COUNT, D_MODEL, WIDTH = 6, 16, 8
Seen = list[torch.Tensor | None]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What each attempt at one call gave."""
    found: Seen = []
    once = moe.route_and_visit

    def watched(*given: Any) -> torch.Tensor | None:
        found.append(once(*given))
        return found[-1]

    monkeypatch.setattr(moe, "route_and_visit", watched)
    return found


def layer(
    rule: str = "renormalised",
    *,
    top_k: int = 2,
    d_model: int = D_MODEL,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> MoE:
    ffns, experts = made("swiglu", dtype, d_model=d_model, d_out=d_model)
    router = {"kind": "linear", "num_experts": COUNT, "d_model": d_model, "scale": 1.5}
    router |= {"select": {"rule": "top_k", "k": top_k}, "weights": rule, "bias": True} | changes
    sizes = {"num_experts": COUNT, "d_model": d_model, "d_out": d_model, "width": WIDTH}
    plain = {"up_bias": True, "output_bias": True, "hidden_dropout": 0, "output_dropout": 0}
    data = {**sizes, **plain, "pointwise": ffns[0].pointwise.to_json(), "router": router}
    made_of = MoE(LayerConfig.from_json(data)).to(dtype).eval()
    made_of.experts.load_state_dict(experts.state_dict())
    made_of.router.float()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*made_of.router.parameters(), made_of.output_bias):
        assert tensor is not None
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return made_of


def tokens(count: int, d_model: int = D_MODEL) -> torch.Tensor:
    return torch.randn(count, d_model, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["one", "renormalised", "softmax"])
def test_it_chooses_and_weighs_as_torch_does(rule: str, dtype: torch.dtype) -> None:
    for d_model, top_k, count in ((16, 2, 1), (30, 1, 5), (16, COUNT, 9), (2100, 4, 11)):
        case = layer(rule, top_k=top_k, d_model=d_model, dtype=dtype)
        x_TD, w = tokens(count, d_model).to(dtype), weights_of(case.experts)
        router = case.router.as_linear()
        got_TO = run_routed(w.up_EGD, w.up_bias_EG, w.down_EOI, w.activation, x_TD, router)
        _, weights_TK, index_TK = case.router(x_TD)
        y_TO = run_compiled(*w[:4], w.activation, x_TD, index_TK, weights_TK)
        assert got_TO is not None
        assert y_TO is not None
        assert got_TO.dtype == dtype
        if rule == "one":
            assert torch.equal(got_TO, y_TO)
            continue
        # The sums are the same, and so is the hidden layer; the weights have two errors each: of a
        # score, which is a sum of D products, and of the exponential and sum of at most E + 8.
        unit = torch.finfo(torch.float32).eps / 2
        size_T = x_TD.double().abs() @ case.router.weight.double().abs().t().amax(1)
        error_T = 4 * 2 * (d_model + 2) * unit * (size_T + 4) + 2 * (COUNT + 8) * unit
        each = [case.experts.expert(e, x_TD).double().abs() for e in range(COUNT)]
        each_TKO = torch.stack(each, 1).gather(1, index_TK[..., None].expand(-1, -1, d_model))
        sum_TO = (each_TKO * weights_TK[..., None]).sum(1)
        rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2 * top_k * unit
        bound_TO = sum_TO * (error_T[:, None] + rounding)
        assert ((got_TO.double() - y_TO.double()).abs() <= bound_TO).all()


def test_a_layer_runs_it_for_few_tokens(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer("one")
    y_TO = case(tokens(3)[None])[0]
    assert torch.equal(y_TO, seen[0] + case.output_bias)
    monkeypatch.setattr(moe, "AT_ONCE", 0)
    assert torch.equal(case(tokens(3)), y_TO)
    assert len(seen) == 1


def test_equal_scores_are_left_to_torch(seen: Seen) -> None:
    case = layer()
    case.router.weight.zero_()
    case.router.bias.zero_()
    _, weights_TK, index_TK = case.router(tokens(3))
    y_TO = case.experts(tokens(3), index_TK, weights_TK) + case.output_bias
    assert torch.equal(case(tokens(3)), y_TO)
    case.router.bias.copy_(torch.tensor([0.0, 1, 0, 0, 2, 0]))  # equal, and not among the best
    case(tokens(3))
    assert [found is None for found in seen] == [True, False]


def test_what_changes_between_two_calls_is_seen(seen: Seen) -> None:
    case, x_TD = layer(), tokens(2)
    y_TO = case(x_TD)
    case.router.scale = 3.0
    bound = 2 * torch.finfo(torch.float32).eps * y_TO.abs().max()
    assert (case(x_TD) - (2 * y_TO - case.output_bias)).abs().max() <= bound
    case.router.weight.neg_()
    case.router.bias.neg_()
    assert not torch.equal(case(x_TD), y_TO)
    case.experts.down_proj = nn.Parameter(torch.zeros_like(case.experts.down_proj))
    assert torch.equal(case(x_TD), case.output_bias.expand(2, -1))
    assert all(found is not None for found in seen)
    for other in (copy.deepcopy(case), pickle.loads(pickle.dumps(case))):
        assert torch.equal(other(x_TD), case(x_TD))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


class FirstExpert(nn.Module):
    """Somebody's own router."""

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        one_T1 = torch.ones(len(x_TD), 1)
        return one_T1, one_T1, torch.zeros(len(x_TD), 1, dtype=torch.int64)


def test_a_router_of_any_class_is_run(seen: Seen) -> None:
    case = layer()
    case.router = FirstExpert()
    expected = case.experts(tokens(2), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert torch.equal(case(tokens(2)), expected + case.output_bias)
    assert not seen


def chosen_elsewhere(case: MoE) -> None:
    vars(case.router)["choose"] = case.router.choose


ELSEWHERE: dict[str, Callable[[MoE], Any]] = {
    "hook on the router": lambda case: hooked(case.router),
    "hook on the experts": lambda case: hooked(case.experts),
    "pre-hook": lambda case: case.router.register_forward_pre_hook(lambda *_: None),
    "another choice": chosen_elsewhere,
    "training": lambda case: case.train(),
    "another implementation": lambda case: case.experts.config.__setattr__(
        "_experts_implementation", "eager"
    ),
    "gradients": lambda case: torch.set_grad_enabled(True),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_who_watches_or_replaces_a_part_gets_torch(what: str, seen: Seen) -> None:
    case = layer()
    ELSEWHERE[what](case)
    y_TO = case(tokens(2))
    assert all(found is None for found in seen)
    assert y_TO.requires_grad == (what == "gradients")


@pytest.mark.parametrize(
    ("cls", "name"), [(Experts, "forward"), (Router, "choose"), (Router, "scores")]
)
def test_a_method_that_somebody_replaced_is_run(
    cls: type, name: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, called = getattr(cls, name), []
    case = layer()

    def other(*given: Any) -> Any:
        called.append(name)
        return own(*given)

    monkeypatch.setattr(cls, name, other)
    case(tokens(2))
    assert called
    assert not seen


@pytest.mark.parametrize(
    "changes", [{"balance": True}, {"nulls": 1}, {"kind": "noisy"}, {"select": {"rule": "all"}}]
)
def test_other_routers_are_torch(changes: dict[str, Any], seen: Seen) -> None:
    select = {"rule": "top_k", "k": 2} | changes.pop("select", {})
    case = layer(**changes, select=select)
    assert case.router.as_linear() is None
    assert case(tokens(2)).shape == (2, D_MODEL)
    for rule in ("gain", "renorm_detach"):
        assert layer(rule).router.as_linear() is None
    assert not seen


def test_other_modes_of_torch_are_torch(seen: Seen) -> None:
    case = layer()
    with all_experts(case):
        case(tokens(2))
    with torch.autocast("cpu", torch.bfloat16):
        case(tokens(2))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    case(tokens(2))
    handle.remove()
    assert not seen
    case.router.double()
    case(tokens(2))
    case.router.float()
    case(tokens(2).bfloat16())  # the router has all digits of the tokens
    assert seen == [None, None]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        case(tokens(2, D_MODEL + 1))


def test_without_a_compiler_it_is_torch(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    case, x_TD = layer(), tokens(3)
    y_TO = case(x_TD)
    monkeypatch.setattr("upcycle.kernels.run_routed", None)
    monkeypatch.setattr(expert_kernels, "run_compiled", None)
    bound = 64 * torch.finfo(torch.float32).eps * y_TO.abs().max()
    assert (case(x_TD) - y_TO).abs().max() <= bound
    assert seen[1] is None
