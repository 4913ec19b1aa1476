"""The importance of neurons: against brute-force autograd, and what gives no gradient."""

import functools
from typing import Any

import numerics
import pytest
import small_models
import torch
from torch import nn

from upcycle.conversion.api import convert, locate
from upcycle.conversion.objectives import next_token, objective_for, projection
from upcycle.errors import UsageError
from upcycle.ir.weights import read_ffn
from upcycle.passes.calibrate.gradients import importance
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.rewrite import with_empty_layers
from upcycle.recipe.schema import Recipe

EPS = 2**-24


def recipe(method: str = "importance", count: int = 2, **more: object) -> Recipe:
    return numerics.make_recipe(
        {"method": method, "count": count, **more},
        {"method": "avg_key", "top_k": 1, "weights": "one"},
        verify={"max_relative_error": 100.0},
    )


def measured(model: nn.Module, batches: list[Any], objective: Any, **more: Any) -> dict[str, Any]:
    """The importance of the neurons of all FFNs, whatever they are."""
    plan = make_plan(locate(model, batches[0]), recipe())
    converted, layers = with_empty_layers(model, plan.specs)
    parameters = dict(model.named_parameters())
    pairs = list(zip(plan.specs, layers, strict=True))
    dense = lambda spec: read_ffn(spec.ffn, parameters)  # noqa: E731
    return dict(importance(converted, pairs, batches, dense=dense, objective=objective, **more))


class Toy(nn.Module):
    """Two inputs, an FFN of two neurons with a residual, and another one after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(1, 2), nn.Linear(2, 1)
        self.up2, self.down2 = nn.Linear(1, 2), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        return x + self.down2(nn.functional.gelu(self.up2(x)))


def test_two_neurons_against_the_derivative_by_hand() -> None:
    toy = Toy().double()
    x = torch.tensor([[0.3], [-1.0], [2.0]]).double()
    found = measured(toy, [(x[:2],), (x[2:],)], lambda y, batch, i: y.square().sum())
    assert {tuple(t.shape) for t in found.values()} == {(1, 2)}
    by_hand = {}
    for name in ("down", "down2"):
        total_F = torch.zeros(2).double()
        for x_D in x:
            kept: list[torch.Tensor] = []

            def keep(module: nn.Module, args: tuple[torch.Tensor], kept: Any = kept) -> None:
                args[0].retain_grad()
                kept.append(args[0])

            hook = getattr(toy, name).register_forward_pre_hook(keep)
            toy(x_D[None]).square().sum().backward()
            hook.remove()
            assert kept[0].grad is not None
            total_F += (kept[0] * kept[0].grad).abs()[0].detach()
        by_hand[name] = total_F / 3
    got = sorted(found.values(), key=lambda t: t.sum().item())
    want = sorted(by_hand.values(), key=lambda t: t.sum().item())
    for one, other in zip(got, want, strict=True):
        # float64, but for the sum in float32 of three numbers.
        torch.testing.assert_close(one[0].double(), other, rtol=0, atol=8 * EPS * other.max())
    assert not torch.allclose(got[0], got[1])


def brute_force(model: Any, batches: list[Any], objective: Any, masks: list[Any]) -> Any:
    """What hooks on the inputs of the contractions of a llama or BERT see, in the same dtype."""
    total: dict[str, torch.Tensor] = {}
    tokens = 0
    for i, batch in enumerate(batches):
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str, module: nn.Module, args: tuple[torch.Tensor], kept: Any = kept) -> None:
            args[0].retain_grad()
            kept[name] = args[0]

        names = [
            n for n, _ in model.named_modules() if n.endswith(("mlp.down_proj", "output.dense"))
        ]
        names = [n for n in names if "attention" not in n]
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(functools.partial(keep, n))
            for n in names
        ]
        objective(model(**batch), batch, i).backward()
        for hook in hooks:
            hook.remove()
        for name, h in kept.items():
            size = (h * h.grad).abs()[masks[i]].sum(0).detach()
            total[name] = total.get(name, 0) + size
        tokens += int(masks[i].sum())
    return [t / tokens for t in total.values()]


def test_a_language_model_with_padding_against_hooks() -> None:
    model = small_models.llama().eval()
    ids = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batches = [
        {"input_ids": ids[s], "attention_mask": mask[s], "use_cache": False}
        for s in (slice(0, 2), slice(2, 4))
    ]
    masks = [mask[:2].bool(), mask[2:].bool()]
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    found = measured(model, batches, objective_for(model, seed=0))
    assert objective_for(model, seed=0) is next_token
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    want = brute_force(model, batches, next_token, masks)
    for got_NF, want_F in zip(found.values(), want, strict=True):
        # Two orders of summing up to 300 products through two layers, relative to the largest.
        torch.testing.assert_close(got_NF[0], want_F, rtol=0, atol=300 * EPS * want_F.max().item())
    everything = [torch.ones_like(m) for m in masks]
    other = brute_force(model, batches, next_token, everything)
    assert not torch.allclose(other[0], want[0])  # the padding would be seen


def test_an_encoder_is_asked_how_much_its_outputs_move() -> None:
    model = small_models.bert().eval()
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    objective = objective_for(model, seed=3)
    found = measured(model, batches, objective)
    want = brute_force(model, batches, objective, [torch.ones_like(ids).bool()])
    for got_NF, want_F in zip(found.values(), want, strict=True):
        # Two orders of summing, as above.
        torch.testing.assert_close(got_NF[0], want_F, rtol=0, atol=300 * EPS * want_F.max().item())
    again = measured(model, batches, objective_for(model, seed=4))
    assert not torch.equal(next(iter(again.values())), next(iter(found.values())))


def test_the_projection_is_the_gauss_newton_diagonal_on_average() -> None:
    # y = W h: the derivative of y by h_j is column j, so the diagonal of J'J is its square.
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    squares = torch.zeros(3)
    for i in range(4000):
        h = torch.ones(1, 3, requires_grad=True)
        projection(h @ weight.t(), (), i, seed=0).backward()
        assert h.grad is not None
        squares += h.grad[0].square() / 4000
    want = weight.square().sum(0)
    # The standard deviation of one draw is below sqrt(2) times the mean; six of those of the mean.
    assert ((squares - want).abs() < 6 * 2**0.5 * want / 4000**0.5).all()


def test_domains_are_apart() -> None:
    model = small_models.llama().eval()
    ids = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(1))
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    both = measured(model, [one], next_token, domains=[torch.tensor([0, 1, 0, 1])])
    part = {n: t[::2] if isinstance(t, torch.Tensor) else t for n, t in one.items()}
    only = measured(model, [part], next_token)
    for path, got_NF in both.items():
        assert got_NF.shape == (2, 64)
        bound = 300 * EPS * float(got_NF.max())
        torch.testing.assert_close(got_NF[:1], only[path], rtol=0, atol=bound)
        assert not torch.allclose(got_NF[0], got_NF[1])


class Stepped(nn.Module):
    """What comes out are whole numbers, as of a model of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).detach()


def test_a_model_without_gradients_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match="has a gradient") as caught:
        convert(Stepped(), recipe(), (torch.randn(4, 8),))
    assert "\n" not in str(caught.value)


class Cut(nn.Module):
    """The first FFN feeds the second one through numbers that autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.up2, self.down2 = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(torch.relu(self.up(x))).detach()
        return self.down2(torch.relu(self.up2(x + first)))


def test_an_ffn_that_no_gradient_gets_to_is_named() -> None:
    with pytest.raises(UsageError, match="no gradient gets to this FFN") as caught:
        measured(Cut(), [(torch.randn(4, 8),)], lambda y, batch, i: y.sum())
    assert "up" in str(caught.value).split(":")[0] or "down" in str(caught.value).split(":")[0]
    assert "\n" not in str(caught.value)
