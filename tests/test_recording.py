"""What a model may do while it is recorded and compared: scripts, modes, writes, odd results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import upcycle
from upcycle.errors import CaptureError, ValueNeededError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # models use it still
]

D, H = 8, 32


def ffn() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


class Model(nn.Module):
    """Does something with an FFN."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.ffn, self.norm = ffn(), nn.LayerNorm(D)
        self.run = run

    def forward(self, *given: Any) -> Any:
        return self.run(self, *given)


def tokens() -> torch.Tensor:
    return torch.randn(4, D, generator=torch.Generator().manual_seed(0))


def located(run: Callable[..., Any], *more: Any) -> Any:
    return upcycle.locate(Model(run).eval(), (tokens(), *more))


def squared_relu(z: torch.Tensor) -> torch.Tensor:
    return torch.relu(z) * torch.relu(z)


def summed(x: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros([count, x.shape[1]], dtype=x.dtype).index_add(0, index, x)


# torch 2.14 says that scripts are deprecated; models that have them are there all the same
SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")


@SCRIPTS
def test_scripted_functions_are_seen_through() -> None:
    act, total = torch.jit.script(squared_relu), torch.jit.script(summed)

    def run(m: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return total(m.ffn[2](act(m.ffn[0](x))), index, 2)

    (found,) = located(run, torch.tensor([0, 1, 1, 0])).ffns
    assert found.pointwise.name == "relu2"
    assert torch.equal(act(torch.tensor([3.0])), torch.tensor([9.0]))  # it is a script again


@SCRIPTS
def test_a_scripted_module_is_told_of() -> None:
    model = Model(lambda m, x: m.norm(m.ffn(x))).eval()
    model.ffn = torch.jit.trace(ffn(), tokens())  # type: ignore[no-untyped-call]
    found = upcycle.locate(model, (tokens(),))
    assert [(m.path, m.reason[:20]) for m in found.misses] == [("ffn", "it is a ScriptModule")]
    with pytest.raises(CaptureError, match="it is a ScriptModule, whose operations are not seen"):
        upcycle.locate(torch.jit.script(ffn()), (tokens(),))


def test_what_runs_functions_and_transforms_is_told_of() -> None:
    transforms: dict[str, Callable[..., Any]] = {
        "torch.func.vmap": lambda m, x: torch.vmap(m.ffn)(x),
        "torch.func.jvp": lambda m, x: torch.func.jvp(m.ffn, (x,), (x,))[1],
        "torch.func.grad": lambda m, x: torch.func.grad(lambda x: m.ffn(x).sum())(x),
        "cond": lambda m, x: torch.cond(x.sum() > 0, m.ffn, lambda x: x * 1.0, (x,)),
    }
    for name, run in transforms.items():
        found = located(run)
        assert not found.ffns
        assert [name in miss.reason for miss in found.misses] == [True]


def test_models_that_no_inputs_could_run_are_refused_with_the_reason() -> None:
    class Encodes(nn.Module):
        """Has no forward."""

    lazy = nn.Sequential(nn.LazyLinear(H), nn.GELU(), nn.Linear(H, D))
    for example in ((tokens(),), None):
        with pytest.raises(CaptureError, match="it has no forward"):
            upcycle.locate(Encodes(), example)
        with pytest.raises(CaptureError, match=r"`0\.weight` has no shape yet"):
            upcycle.locate(lazy, example)
    with pytest.raises(upcycle.UsageError, match=r"`0\.weight` is on the meta device"):
        upcycle.convert(ffn().to("meta"), "split-all", (tokens(),))


def test_inference_mode_on_a_forward_changes_nothing() -> None:
    class Infers(Model):
        @torch.inference_mode()
        def forward(self, *given: Any) -> Any:
            return super().forward(*given)

    model = Infers(lambda m, x: m.ffn(x).add_(1)).eval()
    assert len(upcycle.locate(model, (tokens(),)).ffns) == 1
    upcycle.convert(model, "split-all", (tokens(),), overrides=["experts.count=4"])
    with torch.inference_mode():
        assert tokens().is_inference()


def asserts(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.ffn(x)
    assert torch.isfinite(y).all(), "not finite"
    assert not torch.isnan(y).any()
    return y


def logs(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.ffn(x)
    m.largest = y.max().item()
    return y


def looks(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.ffn(x)
    m.kept = y.numpy()
    return y


def test_assertions_hold_and_values_that_are_read_are_named() -> None:
    assert len(located(asserts).ffns) == 1
    for run, name in ((logs, "item"), (looks, "numpy")):
        with pytest.raises(ValueNeededError, match=f"`{name}` at test_recording.py.*only checked"):
            located(run)


def test_the_checks_of_distributions_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile turns these checks off for the process, and another test may have compiled
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)

    def run(m: Any, x: torch.Tensor) -> Any:
        return torch.distributions.Normal(m.ffn(x), torch.ones(()))

    assert len(located(run).ffns) == 1
    done = upcycle.convert(
        Model(run).eval(), "split-all", (tokens(),), overrides=["experts.count=4"]
    )
    assert done.report.end_to_end is not None
    assert set(done.report.end_to_end.outputs) == {"loc", "scale"}
    with pytest.raises(ValueError, match="constraint"):  # checks are on again
        torch.distributions.Normal(torch.zeros(()), -torch.ones(()))


@dataclass
class Fields:
    y: torch.Tensor


class Own:
    """Of no class that torch knows, and in a circle."""

    def __init__(self, y: torch.Tensor) -> None:
        self.parts, self.me = [{"y": y}], self


def test_tensors_of_any_object_are_outputs() -> None:
    for result in (Fields, Own, lambda y: (Own(y), 3), lambda y: {"deep": [Fields(y)]}):
        model = Model(lambda m, x, result=result: result(m.ffn(x))).eval()
        assert len(upcycle.locate(model, (tokens(),)).ffns) == 1
        wrong = Model(model.run).eval()
        wrong.load_state_dict(model.state_dict())
        assert upcycle.verify(model, wrong, (tokens(),)).relative == 0
        with torch.no_grad():
            wrong.ffn[2].bias += 1
        assert upcycle.verify(model, wrong, (tokens(),)).relative > 0.1


def test_values_through_out_and_empty_tensors_are_known() -> None:
    def run(m: Any, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ends = counts.new_empty(len(counts) + 1)
        ends[:1] = 0
        torch.cumsum(counts, 0, out=ends.narrow(0, 1, len(counts)))
        pairs = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        return torch.cat([m.ffn(x[start:stop]) for start, stop in pairs])

    assert len(located(run, torch.tensor([1, 3])).ffns) == 1


class Writes(Model):
    """Writes its input, a buffer, an attribute and a list."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__(run)
        self.register_buffer("mean", torch.zeros(D))
        self.calls, self.log = 0, list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.calls += 1
        self.log.append(self.calls)
        return self.ffn(x - self.mean)


@pytest.mark.parametrize("recipe", ["split-all", "moefication", "expertweaver"])
def test_a_forward_that_writes_leaves_nothing_behind(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = Writes(ffn).eval(), tokens()
    given, data = x.clone(), [(tokens(),), (tokens(),)]
    more = {} if recipe == "split-all" else {"calibration": data}
    done = upcycle.convert(model, recipe, (x,), overrides=["layers.every=1"], **more)
    assert torch.equal(x, given)
    for batch in data:
        assert torch.equal(batch[0], given)
    for one in (model, done.model):
        assert (one.calls, one.log) == (0, [])
        assert not one.mean.any()


def test_autocast_in_the_forward_is_the_precision_of_the_comparison() -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.norm(m.ffn(m.ffn(x)))

    for model, allowed in ((Model(run), 2e-2), (Model(lambda m, x: m.norm(m.ffn(x))), 1e-5)):
        done = upcycle.convert(
            model.eval(), "split-all", (tokens(),), overrides=["experts.count=4"]
        )
        (check,) = [check for check in done.report.checks if check.what == "end to end"]
        assert check.allowed == allowed


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        return b * 2


def parametrised(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "bias", Twice())


def pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "bias", 0.5)


@pytest.mark.parametrize("change", [parametrised, pruned])
@pytest.mark.parametrize("place", [0, 2])
def test_a_bias_that_is_computed_is_told_of(change: Callable[..., None], place: int) -> None:
    model = Model(lambda m, x: m.norm(m.ffn(x)))
    change(model.ffn[place])
    (miss,) = upcycle.locate(model, (tokens(),)).misses
    assert miss.reason.startswith("its weight or bias is computed in the forward")


def test_complex_weights_and_groups_are_told_of() -> None:
    wide = nn.Sequential(
        nn.Linear(D, H, dtype=torch.cfloat), nn.Tanh(), nn.Linear(H, D, dtype=torch.cfloat)
    )
    (miss,) = upcycle.locate(wide, (torch.zeros(4, D, dtype=torch.cfloat),)).misses
    assert miss.reason == "its weights are complex numbers"
    for groups in ((2, 2), (1, 2), (2, 1)):
        up, down = nn.Conv1d(D, H, 1, groups=groups[0]), nn.Conv1d(H, D, 1, groups=groups[1])
        (miss,) = upcycle.locate(nn.Sequential(up, nn.GELU(), down), (torch.zeros(2, D, 5),)).misses
        assert miss.reason.startswith("`conv1d` has groups")


def test_two_ffns_of_raw_weights_are_two_misses() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(2):
                self.register_parameter(f"up{i}", nn.Parameter(torch.randn(D, H)))
                self.register_parameter(f"down{i}", nn.Parameter(torch.randn(H, D)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + F.relu(x @ self.up0) @ self.down0
            return x + F.relu(x @ self.up1) @ self.down1

    misses = upcycle.locate(Raw(), (tokens(),)).misses
    assert [miss.reason.split(" are ")[0] for miss in misses] == [
        f"its weights `up{i}` and `down{i}`" for i in range(2)
    ]
    assert all("move each FFN into a module of its own" in miss.reason for miss in misses)


class Holder:
    """What a module keeps and its forward fills, and is no module."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []
        self.inner: dict[str, Holder] = {}


class Fills(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.holder = Holder()
        self.holder.inner["deep"] = Holder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.up(x).relu())
        self.holder.last = y
        self.holder.seen.append(y)
        self.holder.inner["deep"].last = y
        return y


def test_objects_that_the_forward_fills_are_as_they_were() -> None:
    model = Fills()
    held, deep = model.holder, model.holder.inner["deep"]
    assert len(upcycle.locate(model, (torch.randn(2, 4),)).ffns) == 1
    assert model.holder is held
    assert held.inner["deep"] is deep
    assert (held.last, deep.last, held.seen) == (None, None, [])
    model(torch.randn(2, 4))  # and they still work
    assert deep.last is held.last
