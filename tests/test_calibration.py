"""What methods are shown: exactly what each FFN is given, without padding, one layer at a time."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import small_models
import torch
import transformers
from torch import nn

from upcycle.errors import CaptureError, UsageError
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, read_ffn
from upcycle.layers.moe import MoE
from upcycle.passes.calibrate.batch_barrier import BatchBarrier
from upcycle.passes.calibrate.calibrate import calibrate
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.rewrite import fill, with_empty_layers
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import load_recipe

t: Any = transformers
ALL = ["experts.count=4", "router.top_k=all", "router.weights=one"]  # exact: every expert runs
FEW = ["experts.count=4", "router.top_k=2"]  # half of the neurons: far from the dense model


def waiting_threads() -> list[str]:
    """Threads of a barrier that are still there; other tests may have left theirs."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batch ")]


class Halves(nn.Module):
    """Two FFNs, of which one is run for positive inputs and the other for negative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor, swapped: bool = False, short: bool = False) -> torch.Tensor:
        first, second = (self.b, self.a) if swapped else (self.a, self.b)
        x = x + first(x)
        return x if short else x + second(x)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(seed))


def run(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    overrides: Sequence[str] = FEW,
    sequential: bool = False,
    example: Any = None,
    domains: Sequence[torch.Tensor] | None = None,
    also: Callable[[MoESpec, MoE, FFNInputs], None] = lambda *_: None,
) -> tuple[dict[str, FFNInputs], nn.Module]:
    """What each FFN was given, in the order of the visits, and the converted model."""
    recipe = load_recipe("factorllm", overrides)
    plan = make_plan(locate_in(model, example), recipe)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    converted, layers = with_empty_layers(model, plan.specs)
    seen: dict[str, FFNInputs] = {}

    def visit(spec: MoESpec, layer: MoE, ffn: FFNWeights, given: FFNInputs) -> None:
        assert spec.ffn.path not in seen
        seen[spec.ffn.path] = given
        fill(layer, transform(ffn, spec, given), torch.device("cpu"))
        also(spec, layer, given)

    calibrate(
        converted,
        list(zip(plan.specs, layers, strict=True)),
        batches,
        dense=lambda spec: read_ffn(spec.ffn, parameters),
        visit=visit,
        sequential=sequential,
        domains=domains,
    )
    return seen, converted


def inputs_of(model: nn.Module, paths: Sequence[str], batches: Sequence[Any]) -> dict[str, Any]:
    """What the modules at `paths` are given, [T, D], batch after batch."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: found[path].append(args[0].detach().flatten(0, -2))
        )
        for path in paths
    ]
    with torch.no_grad():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(**batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to rounding in a model of two layers, whose numbers are about one."""
    bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parallel_layers_see_the_dense_activations(dtype: torch.dtype) -> None:
    model = small_models.build("llama").to(dtype)
    batches = [{"input_ids": ids(2, 9, seed=seed), "use_cache": False} for seed in range(3)]
    seen, _ = run(model, batches)
    expected = inputs_of(model, list(seen), batches)
    for path, given in seen.items():
        assert given.x[0].dtype == dtype
        assert_close(torch.cat(given.x), expected[path])
        assert given.id_T is not None
        assert (
            given.id_T.tolist() == torch.cat([b["input_ids"].flatten() for b in batches]).tolist()
        )


def test_sequential_layers_see_what_converted_ones_give() -> None:
    model = small_models.build("llama")
    batches = [{"input_ids": ids(2, 9, seed=seed), "use_cache": False} for seed in range(3)]
    seen, converted = run(model, batches, sequential=True)
    actual = {path: torch.cat(given.x) for path, given in seen.items()}
    expected = inputs_of(converted, list(seen), batches)
    dense = inputs_of(model, list(seen), batches)
    first, last = seen
    assert_close(actual[first], dense[first])
    assert_close(actual[last], expected[last])
    assert (actual[last] - dense[last]).abs().max() > 0.1 * dense[last].abs().max()


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_is_left_out_and_ids_stay_aligned(sequential: bool) -> None:
    """The first FFN of a BERT sees what follows from ids and places alone up to attention."""
    model = small_models.build("bert")
    tokens, mask = ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    domain_B = torch.tensor([4, 5, 6])
    seen, _ = run(
        model,
        [{"input_ids": tokens, "attention_mask": mask}] * 2,
        sequential=sequential,
        domains=[domain_B, domain_B],
    )
    for given in seen.values():
        assert len(given) == 2 * int(mask.sum())
        assert given.id_T is not None
        assert given.domain_T is not None
        assert given.id_T.tolist() == tokens[mask.bool()].tolist() * 2
        assert given.domain_T.tolist() == ([4] * 8 + [5] * 5 + [6] * 2) * 2
    first = next(iter(seen.values()))
    alone, _ = run(model, [{"input_ids": tokens[1:2, :5], "attention_mask": mask[1:2, :5]}])
    assert_close(next(iter(alone.values())).x[0], first.x[0][8:13])


def test_a_model_that_puts_the_sequences_second() -> None:
    """XLNet computes on [L, B, D]; ids and padding follow."""
    torch.manual_seed(0)
    config = t.XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=4, d_inner=64)
    model = t.XLNetModel(config).eval()
    tokens, mask = ids(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    seen, _ = run(model, [{"input_ids": tokens, "attention_mask": mask, "use_mems": False}])
    (given,) = seen.values()
    assert given.id_T is not None
    expected = [int(tokens[b, place]) for place in range(5) for b in range(2) if mask[b, place]]
    assert given.id_T.tolist() == expected


def test_an_ffn_that_is_used_several_times() -> None:
    torch.manual_seed(0)
    config = t.AlbertConfig(
        vocab_size=300, embedding_size=16, hidden_size=32, num_attention_heads=4,
        intermediate_size=64, num_hidden_layers=3,
    )  # fmt: skip
    model = t.AlbertModel(config).eval()
    batches = [{"input_ids": ids(2, 7, seed=seed)} for seed in range(2)]
    seen, converted = run(model, batches, overrides=ALL, sequential=True)
    (given,) = seen.values()
    assert len(given) == 3 * 2 * 14
    assert given.id_T is not None
    with torch.no_grad():
        actual = converted(**batches[0]).last_hidden_state
        assert_close(actual, model(**batches[0]).last_hidden_state)


def test_encoder_and_decoder_have_their_own_tokens() -> None:
    model = small_models.build("t5")
    batch = {"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 5, seed=1), "use_cache": False}
    seen, _ = run(model, [batch] * 2)
    for path, given in seen.items():
        name = "input_ids" if path.startswith("encoder") else "decoder_input_ids"
        assert given.id_T is not None
        assert given.id_T.tolist() == batch[name].flatten().tolist() * 2


def test_tokens_that_cannot_be_told_apart_are_refused() -> None:
    batch = {"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 8, seed=1), "use_cache": False}
    with pytest.raises(UsageError, match="cannot be told apart"):
        run(small_models.build("t5"), [batch])


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "qwen3"])
def test_every_placement(name: str) -> None:
    """Taps, inline linear maps and swapped modules; the result is the dense model."""
    model = small_models.build(name)
    batches = [{"input_ids": ids(2, 9, seed=seed)} for seed in range(3)]
    for sequential in (True, False):
        seen, converted = run(model, batches, overrides=ALL, sequential=sequential)
        assert [len(given) for given in seen.values()] == [3 * 18] * 2
        with torch.no_grad():
            assert_close(converted(**batches[0]).logits, model(**batches[0]).logits)


def test_convolutions_have_their_features_second() -> None:
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Conv2d(6, 12, 1), nn.GELU(), nn.Conv2d(12, 6, 1)).eval()
    x = torch.randn(2, 6, 3, 4)
    seen, _ = run(ffn, [(x,), (x + 1,)], example=(x,), domains=[torch.tensor([0, 1])] * 2)
    (given,) = seen.values()
    expected = torch.cat([x, x + 1]).movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(torch.cat(given.x), expected, rtol=0, atol=0)
    assert given.id_T is None
    assert given.domain_T is not None
    assert given.domain_T.tolist() == ([0] * 12 + [1] * 12) * 2


@pytest.mark.parametrize("rest", [{"swapped": True}, {"short": True}])
def test_batches_that_run_other_layers_are_refused(rest: dict[str, bool]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    with pytest.raises(CaptureError, match="do not run the same FFNs in the same order"):
        run(Halves(), [{"x": x}, {"x": x} | rest], example={"x": x})
    assert not waiting_threads()


def test_an_ffn_that_no_data_reaches_is_named() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(UsageError, match=r"^b: the calibration data never reaches this FFN"):
        run(Halves(), [{"x": x, "short": True}], example={"x": x})


def test_no_data() -> None:
    with pytest.raises(UsageError, match="there is no calibration data"):
        run(Halves(), [], example={"x": torch.randn(3, 8)})


@pytest.mark.parametrize("at", ["visit", "forward"])
def test_an_exception_gets_out_and_no_thread_stays(at: str) -> None:
    torch.manual_seed(0)
    model = Halves()
    x = torch.randn(3, 8)
    batches = [{"x": x}] * 3

    def fail(*_: object) -> None:
        raise KeyboardInterrupt("by hand")

    if at == "forward":  # the second FFN takes no tensor of this width
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(model, [{"x": x}, {"x": torch.randn(3, 9)}], example={"x": x})
    else:
        with pytest.raises(KeyboardInterrupt, match="by hand"):
            run(model, batches, example={"x": x}, also=fail)
    assert not waiting_threads()


def test_an_error_between_two_places_frees_those_that_wait() -> None:
    steps = BatchBarrier(3)
    passed = []

    def forward(i: int) -> None:
        steps.wait(lambda: None)
        if i == 1:
            raise ValueError("in the middle")
        passed.append(i)
        steps.wait(lambda: passed.append(10))

    with pytest.raises(ValueError, match="in the middle"):
        steps.run(forward)
    assert passed == [0]
    assert not waiting_threads()


def test_batches_take_turns_in_order() -> None:
    steps, order = BatchBarrier(4), []

    def forward(i: int) -> None:
        for _ in range(3):
            order.append(i)
            steps.wait(lambda: order.append(-1))

    steps.run(forward)
    assert order == [0, 1, 2, 3, -1] * 3


def test_one_layer_at_a_time_is_in_memory() -> None:
    """When a layer is visited, nothing of what the one before was given is left."""
    torch.manual_seed(0)
    model = small_models.llama(num_hidden_layers=4).eval()
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def look(spec: MoESpec, layer: MoE, given: FFNInputs) -> None:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        alive.extend(weakref.ref(x) for x in given.x)

    recipe = load_recipe("factorllm", FEW)
    plan = make_plan(locate_in(model), recipe)
    parameters = dict(model.named_parameters())
    converted, layers = with_empty_layers(model, plan.specs)
    calibrate(
        converted,
        list(zip(plan.specs, layers, strict=True)),
        [{"input_ids": ids(2, 16, seed=i), "use_cache": False} for i in range(4)],
        dense=lambda spec: read_ffn(spec.ffn, parameters),
        visit=lambda spec, layer, ffn, given: look(spec, layer, given),
        sequential=False,
    )
    assert counts == [0, 0, 0, 0]


def test_the_same_data_gives_the_same_bytes() -> None:
    model = small_models.build("llama")
    batches = [{"input_ids": ids(2, 9, seed=seed)} for seed in range(3)]
    states = [run(model, batches, sequential=True)[1].state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_model_is_left_as_it_was() -> None:
    model = small_models.build("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, converted = run(model, [{"input_ids": ids(2, 9)}])
    assert model.training
    assert converted.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    for layer in converted.modules():
        if isinstance(layer, MoE):
            assert "tokens" not in vars(layer)
            assert not layer._forward_pre_hooks
