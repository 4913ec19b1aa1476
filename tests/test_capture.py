"""Capture: what it leaves behind, what it records, and how it fails."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from upcycle.capture.capture import capture
from upcycle.capture.guess_inputs import find_example
from upcycle.capture.recorder import Program, op_name, replayed_block
from upcycle.errors import CaptureError
from upcycle.passes.locate.locate import locate

pytestmark = pytest.mark.usefixtures("one_thread")


def fakes(thing: Any, seen: set[int]) -> bool:
    """Whether a fake tensor can be reached from `thing`."""
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, FakeTensor):
        return True
    if isinstance(thing, dict):
        return any(fakes(value, seen) for value in thing.values())
    if isinstance(thing, list | tuple | set):
        return any(fakes(value, seen) for value in thing)
    return hasattr(thing, "__dict__") and fakes(vars(thing), seen)


def names(program: Program) -> list[str]:
    return [op_name(n.target) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = zoo.model(name)
    example = zoo.inputs(name)
    attributes = [dict(vars(module)) for module in model.modules()]
    state = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        before = zoo.run(model, example)
    random = torch.get_rng_state()
    program = capture(model, example)
    assert torch.equal(random, torch.get_rng_state())
    for module, kept in zip(model.modules(), attributes, strict=True):
        assert list(vars(module)) == list(kept)
        assert all(vars(module)[key] is value for key, value in kept.items())
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == state[key][0]
        assert torch.equal(tensor, state[key][1])
    assert not fakes(model, set())
    with torch.no_grad():
        assert torch.equal(zoo.run(model, example), before)
    pickle.dumps(program.replays)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_repeated_blocks_give_the_same_findings(name: str) -> None:
    model = zoo.model(name)
    make = zoo.ZOO[name].example
    example = make() if make else find_example(model)[0]
    short = locate(capture(model, example))
    full = locate(capture(model, example, repeat_blocks=False))
    assert short.ffns == full.ffns
    assert set(short.misses) == set(full.misses)


@pytest.mark.parametrize("name", ["bert", "llama", "opt", "t5", "mlps", "mobilebert"])
def test_blocks_are_recorded_twice_and_then_replayed(name: str) -> None:
    if name == "mobilebert":
        import transformers as hf

        sizes = {"intra_bottleneck_size": 16, "embedding_size": 16, "vocab_size": 99}
        config = hf.MobileBertConfig(**zoo.SIZES, **sizes, num_hidden_layers=5)
        with torch.device("meta"):
            model: nn.Module = hf.MobileBertModel(config)
        model.eval()
    else:
        model = zoo.model(name)
        if name != "mlps":
            blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
            blocks.extend([copy.deepcopy(blocks[-1]) for _ in range(3)])
    example, program = find_example(model)
    full = capture(model, example, repeat_blocks=False)
    if name != "t5":  # its blocks were built with a different first one
        assert program.replays
    assert len(program.graph.nodes) <= len(full.graph.nodes)
    assert locate(program).ffns == locate(full).ffns
    assert set(locate(program).misses) == set(locate(full).misses)


def test_meta_weights_are_enough() -> None:
    for name in ("llama", "bert", "t5", "convnext"):
        with torch.device("meta"):
            model = zoo.ZOO[name].build().eval()
        assert find_example(model)[1].graph.nodes
        assert all(p.is_meta for p in model.parameters())


class Stateful(nn.Module):
    """Keeps what it sees in every way that a module has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.seen: list[torch.Tensor] = []
        self.named: dict[str, torch.Tensor] = {}
        self.last: torch.Tensor | None = None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 4] -> [B, 4]."""
        self.count += 1
        self.last = hidden = F.relu(self.up(self.norm(x)))
        self.seen.append(hidden)
        self.named["hidden"] = hidden
        self.fresh = hidden
        out: torch.Tensor = self.down(hidden)
        return out


def test_what_a_forward_stores_is_taken_away_again() -> None:
    model = Stateful()
    handle = model.up.register_forward_hook(lambda *_: None)
    capture(model, (torch.zeros(3, 4),))
    assert model.seen == []
    assert model.named == {}
    assert model.last is None
    assert not hasattr(model, "fresh")
    assert model.count == 0
    assert model.norm.num_batches_tracked == 0
    assert handle.id in model.up._forward_hooks
    assert not fakes(model, set())
    model(torch.randn(3, 4))
    assert len(model.seen) == 1


def test_a_failing_forward_is_one_sentence_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = Stateful()
    with pytest.raises(CaptureError) as raised:
        capture(model, (torch.zeros(3, 5),))
    text = str(raised.value)
    assert "\n" not in text
    assert text.startswith("Stateful: the forward fails on example inputs {0: [3, 5]}")
    assert "`example_inputs`" in text
    assert not fakes(model, set())
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


class Branching(nn.Module):
    """What it does next is `decide(x, numbers)`; the model is linear behind that."""

    def __init__(self, decide: Callable[..., Any]) -> None:
        super().__init__()
        self.mlp = zoo.mlp(8, 16, 8)
        self.decide = decide

    def forward(self, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """x [B, 8], integers [B] -> [?, 8]."""
        out: torch.Tensor = self.mlp(self.decide(self.mlp(x), numbers))
        return out


def branch(decide: Callable[..., Any], numbers: list[int]) -> Program:
    return capture(Branching(decide), (torch.zeros(len(numbers), 8), torch.tensor(numbers)))


def size_after(decide: Callable[..., Any], numbers: list[int]) -> int:
    last = [node for node in branch(decide, numbers).graph.nodes if node.op == "call_function"][-1]
    return int(last.meta["shape"][0])


def written_through_a_view(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(4, dtype=torch.long)
    table[:2].add_(n.sum())
    return x[: table[1]]


@pytest.mark.parametrize(
    ("decide", "size"),
    [
        (lambda x, n: x if n.max().item() > 2 else x[:1], 3),
        (lambda x, n: x if n.max().item() > 3 else x[:1], 1),
        (lambda x, n: x[n > 0], 2),
        (lambda x, n: x.split(n.tolist())[2], 3),
        (lambda x, n: x[: n[2] - 1], 2),
        (lambda x, n: x.repeat_interleave(n, 0), 3),
        (lambda x, n: x[(1.0 - (n == 0).float()).nonzero()[:, 0]], 1),
        (lambda x, n: x.new_zeros(n[2], 8), 3),
        (written_through_a_view, 3),
    ],
)
def test_what_follows_from_integer_inputs_is_known(decide: Callable[..., Any], size: int) -> None:
    numbers = [0, 0, 3] if size != 2 else [1, 0, 3]
    assert size_after(decide, numbers) == size


@pytest.mark.parametrize(
    ("decide", "call"),
    [
        (lambda x, n: x if x.sum() > 0 else -x, "bool"),
        (lambda x, n: x * x.max().item(), "item"),
        (lambda x, n: x[x[:, 0] > 0], "getitem"),
        (lambda x, n: x if torch.rand(()) > 0.5 else -x, "bool"),
        (lambda x, n: x if n.float().add_(x.sum()).sum() > 0 else -x, "bool"),
        (lambda x, n: x if torch.zeros(3)[:2].add_(x.sum())[0] else -x, "bool"),
    ],
)
def test_what_follows_from_floats_or_chance_is_refused(
    decide: Callable[..., Any], call: str
) -> None:
    with pytest.raises(CaptureError) as raised:
        branch(decide, [1, 0, 3])
    text = str(raised.value)
    line = decide.__code__.co_firstlineno
    assert text.startswith(f"Branching: `{call}` at test_capture.py:{line} reads a value that")
    assert "\n" not in text


def test_known_values_change_nothing_outside() -> None:
    model = Branching(lambda x, n: x[: n.add_(1)[0]] * torch.rand(3)[0])
    numbers = torch.tensor([1, 2, 3])
    random = torch.get_rng_state()
    capture(model, (torch.zeros(3, 8), numbers))
    assert numbers.tolist() == [1, 2, 3]
    assert torch.equal(torch.get_rng_state(), random)


def test_values_of_large_tensors_are_not_worked_out() -> None:
    with pytest.raises(CaptureError, match="`bool`"):
        branch(lambda x, n: x if torch.zeros(2**20 + 1).any() else -x, [1])


def test_blocks_that_see_other_values_are_not_merged() -> None:
    class Slow(Block):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if mask.all() else x * 1.0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Slow() for _ in range(4))

        def forward(self, x: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
            for block, mask in zip(self.blocks, masks, strict=True):
                x = block(x, mask)
            return x

    masks = torch.ones(4, 5, dtype=torch.bool)
    masks[2, 0] = False
    assert len(locate(capture(Model(), (torch.zeros(2, 8), masks))).ffns) == 3


def test_training_with_layer_drop_is_recorded_in_evaluation_mode() -> None:
    model = zoo.model("opt").train()
    assert capture(model, zoo.inputs("opt")).graph.nodes
    assert all(module.training for module in model.modules())


def test_grad_mode_does_not_matter() -> None:
    model = zoo.model("llama")
    example = zoo.inputs("llama")
    with torch.no_grad():
        first = locate(capture(model, example))
    assert first == locate(capture(model, example))
    with torch.inference_mode():
        assert first == locate(capture(model, example))


def test_a_compiled_submodule_is_seen_through() -> None:
    model = nn.Sequential(nn.LayerNorm(8), torch.compile(zoo.mlp(8, 16, 8), backend="eager"))
    (ffn,) = locate(capture(model, (torch.zeros(3, 8),))).ffns
    assert ffn.d_ff == 16


def test_outputs_in_a_dataclass_keep_the_graph_alive() -> None:
    from dataclasses import dataclass

    @dataclass
    class Out:
        y: torch.Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = zoo.mlp()

        def forward(self, x: torch.Tensor) -> Out:
            return Out(self.mlp(x))

    assert len(locate(capture(Model(), (torch.zeros(3, zoo.D),))).ffns) == 1


class Block(nn.Module):
    """An MLP whose computation depends on plain attributes."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor] = F.relu, **more: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = act
        self.norm = nn.LayerNorm(8, eps=more.pop("eps", 1e-5))
        self.__dict__.update(more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 8] -> [..., 8]."""
        out: torch.Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return out


class Options:
    """A nested object among the attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def replays(*blocks: nn.Module) -> bool:
    model = nn.Sequential(*blocks)
    return replayed_block in [n.target for n in capture(model, (torch.zeros(2, 8),)).graph.nodes]


def test_equal_blocks_are_merged() -> None:
    assert replays(*(Block() for _ in range(3)))
    assert replays(*(Block(layer_idx=i) for i in range(3)))
    assert replays(*(Block(layer_number=i + 1) for i in range(3)))
    assert replays(*(Block(options=Options(eps=1, sizes=[1, 2])) for _ in range(3)))
    assert replays(*(copy.deepcopy(Block()) for _ in range(3)))


def test_blocks_that_look_alike_and_differ_are_not_merged() -> None:
    assert not replays(Block(), Block(), Block(F.gelu))
    assert not replays(Block(), Block(), Block(eps=1e-6))
    assert not replays(*(Block(options=Options(eps=i)) for i in (1, 1, 2)))
    assert not replays(*(Block(kinds=["full", kind]) for kind in ("a", "a", "b")))
    assert not replays(*(Block(width=i) for i in range(3)))  # a number that is no index
    assert not replays(Block(), Block(), Block().train(False))
    shared = Block()
    shared.down = Block().down
    assert not replays(Block(), Block(), shared, nn.Sequential(nn.Linear(8, 16), shared.down))
    one_norm = Block()
    one_norm.again = one_norm.norm
    two_norms = Block()
    two_norms.again = nn.LayerNorm(8)
    assert not replays(two_norms, copy.deepcopy(two_norms), one_norm)


def test_different_activations_are_found_in_blocks_that_look_alike() -> None:
    model = nn.Sequential(*(Block(act) for act in (F.relu, F.relu, F.gelu, F.silu, F.relu)))
    found = locate(capture(model, (torch.zeros(2, 8),)))
    assert [ffn.pointwise.name for ffn in found.ffns] == ["relu", "relu", "gelu", "silu", "relu"]


def test_blocks_called_in_different_ways_are_not_merged() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = zoo.mlp(8, 16, 8)

        def forward(self, x: torch.Tensor, wide: bool) -> torch.Tensor:
            out: torch.Tensor = self.mlp(x)
            return torch.cat([out, out], -1)[..., :8] if wide else out

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Switch() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i, block in enumerate(self.blocks):
                x = x + block(x, i % 2 == 0)
            return x

    assert "replayed_block" not in names(capture(Model(), (torch.zeros(2, 8),)))


class Asserts(nn.Module):
    """Checks what it was given, and branches on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = zoo.mlp(8, 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 8] -> [..., 8]."""
        torch._check_tensor_all_with(ValueError, x < 2, lambda: "too large")
        out: torch.Tensor = self.mlp(x)
        return out


def test_an_assertion_about_unknown_values_is_no_branch() -> None:
    assert len(locate(capture(Asserts(), (torch.zeros(2, 8),))).ffns) == 1
