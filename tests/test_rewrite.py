"""A converted model computes what the dense one did, and is still a normal module."""

import copy
import functools
import io
import threading
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

import upcycle
from upcycle.layers.moe import MoE
from upcycle.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

COPIES = Recipe.model_validate(
    {
        "experts": {"method": "copy", "count": 3},
        "router": {"method": "normal", "top_k": 2, "weights": "renormalised", "std": 0.3},
    }
)
GRANULAR = Recipe.model_validate(
    {
        "experts": {"method": "granular", "count": 2, "granularity": 4},
        "router": {
            "method": "virtual_group",
            "top_k": 4,
            "weights": "renormalised",
            "std": 0.3,
        },
    }
)
SPLIT_ALL = Recipe.model_validate(
    {
        "experts": {"method": "contiguous", "count": 5},
        "router": {"method": "avg_key", "top_k": "all", "weights": "one"},
    }
)
SPLIT_SOME = SPLIT_ALL.model_copy(
    update={"router": SPLIT_ALL.router.model_copy(update={"top_k": 1})}
)
EXACT = {"copy": COPIES, "granular": GRANULAR, "split-all": SPLIT_ALL}
TAPPED = ["bert", "opt", "encoder", "convnext", "fused_inline"]
MIXED = ["llama", "gpt2", *TAPPED]

# The float32 budget of `upcycle.ir.rounding.ROUNDING`, whose derivation is there.
RELATIVE = 1e-5


@functools.cache
def located(name: str) -> upcycle.Located:
    dense = zoo.model(name)
    return upcycle.locate(dense, zoo.inputs(name))


def convert(name: str, recipe: Recipe, dense: nn.Module) -> nn.Module:
    example = zoo.inputs(name)
    made = upcycle.convert(dense, recipe, example, verify=False, located=located(name))
    return made.model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def layers_of(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def out(model: nn.Module, example: Any) -> torch.Tensor:
    with torch.no_grad():
        return zoo.run(model, example)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_exact_conversions_keep_the_function_and_others_do_not(name: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    state = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    classes = [type(module) for module in dense.modules()]
    expected = out(dense, example)
    for recipe in EXACT.values():
        converted = convert(name, recipe, dense)
        assert len(layers_of(converted)) == zoo.ZOO[name].ffns
        assert relative(out(converted, example), expected) < RELATIVE
    some = convert(name, SPLIT_SOME, dense)
    assert relative(out(some, example), expected) > 1e-3
    with torch.no_grad():
        for layer in layers_of(some):
            layer.experts.down_proj.zero_()
            if layer.output_bias is not None:
                layer.output_bias.zero_()
    # What the FFNs add matters, so that a test which passes says something.
    assert relative(out(some, example), expected) > 1e-2
    assert [type(module) for module in dense.modules()] == classes
    assert dense.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in dense.state_dict().items())
    assert torch.equal(out(dense, example), expected)


@pytest.mark.parametrize("name", ["llama", "bert", "opt", "t5_gated", "encoder_layer"])
def test_bfloat16_is_no_worse_than_the_dense_model(name: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    if isinstance(example, tuple):
        example = tuple(t.bfloat16() for t in example)
    low = copy.deepcopy(dense).bfloat16()
    exact = out(dense.double(), example if isinstance(example, dict) else _double(example))
    dense_error = relative(out(low, example).double(), exact)
    for recipe in EXACT.values():
        error = relative(out(convert(name, recipe, low), example).double(), exact)
        assert error < 2 * dense_error


def _double(example: Any) -> Any:
    return tuple(t.double() for t in example)


@pytest.mark.parametrize("name", [*MIXED, "albert", "placed_twice"])
def test_copies_files_and_state_dicts(name: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    first = convert(name, COPIES, dense)
    expected = out(first, example)
    assert torch.equal(out(copy.deepcopy(first), example), expected)
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    assert torch.equal(out(torch.load(file, weights_only=False), example), expected)
    other = convert(name, COPIES.model_copy(update={"seed": 5}), dense)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(first.state_dict())
    assert torch.equal(out(other, example), expected)
    storages = [p.data_ptr() for p in first.parameters()]
    assert len(storages) == len(set(storages))
    sites = sum(key.endswith("experts.down_proj") for key in first.state_dict())
    assert sites == len(layers_of(first)) * (2 if name == "placed_twice" else 1)


@pytest.mark.parametrize("name", [*MIXED, "t5", "whisper", "called_twice"])
def test_gradients_are_the_dense_ones(name: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    converted = convert(name, COPIES, dense)
    torch.manual_seed(0)
    weights = torch.randn(out(dense, example).shape)
    for model in (dense, converted):
        (zoo.run(model, example) * weights).sum().backward()
    expected = dict(dense.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values() if p.grad is not None)
    compared = 0
    for key, parameter in converted.named_parameters():
        if key in expected and expected[key].grad is not None:
            reference = expected[key].grad
            assert parameter.grad is not None
            assert reference is not None
            # Every gradient is a sum of products of what flows back, which rounds as the outputs
            # do. The bias of a key has the gradient zero, a sum of terms of the others' size.
            gap = (parameter.grad - reference).abs().max()
            assert gap <= RELATIVE * (reference.abs().max() + largest), key
            compared += 1
    assert compared or name in {"called_twice"}
    for layer in layers_of(converted):
        for part in (layer.experts.up_EGD, layer.experts.down_proj):
            assert part.grad is not None
            assert part.grad.abs().max() > 0
        assert layer.router.weight.grad is not None
    trained = convert(name, SPLIT_SOME.model_copy(update={"router": _softmax()}), dense)
    zoo.run(trained, example).sum().backward()
    for layer in layers_of(trained):
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.abs().max() > 0


def _softmax() -> Any:
    return SPLIT_SOME.router.model_copy(update={"weights": "softmax"})


@pytest.mark.parametrize("name", [*MIXED, "t5", "albert"])
def test_training_with_dropout_runs(name: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    converted = convert(name, COPIES, dense.train())
    assert converted.training
    assert all(layer.training for layer in layers_of(converted))
    torch.manual_seed(0)
    zoo.run(converted, example).sum().backward()
    converted.eval()
    dense.eval()
    assert relative(out(converted, example), out(dense, example)) < RELATIVE


def test_hidden_and_output_dropout_are_those_of_the_dense_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            drop = [nn.Dropout(0.5), nn.Dropout(0.25)]
            self.mlp = nn.Sequential(
                nn.Linear(8, 64), nn.ReLU(), drop[0], nn.Linear(64, 8), drop[1]
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.mlp(x)
            return y

    dense = Model()
    converted = upcycle.convert(dense, SPLIT_ALL, (torch.zeros(3, 8),), verify=False).model
    (layer,) = layers_of(converted)
    assert (layer.experts.act_fn.dropout, layer.output_dropout) == (0.5, 0.25)
    torch.manual_seed(0)
    x = torch.randn(4000, 8)
    zeros = (converted(x) == 0).float().mean().item()
    assert abs(zeros - 0.25) < 0.02  # 32000 draws: five standard deviations are 0.012


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", ["opt", "bert", "encoder", "fused_inline"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    model = convert(name, COPIES, dense).train(False)
    zoo.run(model, example).sum().backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()  # transformers checkpoints in training only
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        zoo.run(model, example).sum().backward()
    else:
        (x,) = example
        checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    # Of the whole model: keys have a bias whose gradient is zero, of which rounding is left.
    scale = max(grad.abs().max() for grad in expected.values() if grad is not None)
    for key, parameter in model.named_parameters():
        if expected[key] is not None:
            assert parameter.grad is not None, key
            assert (parameter.grad - expected[key]).abs().max() <= RELATIVE * scale, key
    copy.deepcopy(model)
    if not hasattr(model, "gradient_checkpointing_enable"):  # that leaves a local function behind
        torch.save(model, io.BytesIO())


@pytest.mark.parametrize("name", [name for name, case in zoo.ZOO.items() if case.generates])
def test_generation_with_a_cache_gives_the_same_tokens(name: str) -> None:
    dense: Any = zoo.model(name)
    tokens = torch.randint(3, zoo.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = dense.generate(tokens, **options)
    for recipe in EXACT.values():
        converted: Any = convert(name, recipe, dense)
        assert torch.equal(converted.generate(tokens, **options), expected)
        without = converted.generate(tokens, **options, use_cache=False)
        assert torch.equal(without, expected)


def test_hooks_on_other_modules_survive() -> None:
    dense = zoo.model("opt")
    example = zoo.inputs("opt")
    calls: list[str] = []
    layer: Any = dense.get_submodule("model.decoder.layers.0")
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append("attention"))
    converted = convert("opt", COPIES, dense)
    calls.clear()
    out(converted, example)
    assert calls == ["attention", "layer"]


@pytest.mark.parametrize("name", MIXED)
def test_moving_to_another_dtype_and_to_meta(name: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    converted = convert(name, COPIES, dense)
    expected = out(converted, example)
    assert relative(out(converted.double(), _as(example, torch.float64)), expected) < RELATIVE
    low = out(converted.bfloat16(), _as(example, torch.bfloat16))
    assert low.dtype == torch.bfloat16
    meta = converted.to("meta")
    assert all(p.is_meta for p in meta.parameters())
    if name in {"llama", "gpt2"}:
        return  # their masks want numbers, in the dense models too
    with torch.device("meta"):
        assert out(meta, _as(example, torch.bfloat16, "meta")).shape == expected.shape


def _as(example: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    if isinstance(example, tuple):
        return tuple(cast(value) for value in example)
    return {key: cast(value) for key, value in example.items()}


def test_conversion_of_meta_weights_needs_only_shapes() -> None:
    with torch.device("meta"):
        dense = zoo.ZOO["bert"].build().eval()
    converted = upcycle.convert(dense, COPIES, verify=False).model
    assert all(p.is_meta for p in converted.parameters())


def test_threads_do_not_meet() -> None:
    dense = zoo.model("opt")
    model = convert("opt", COPIES, dense)
    examples = [zoo.inputs("opt", seed) for seed in range(2)]
    expected = [out(model, example) for example in examples]
    results: dict[int, list[bool]] = {0: [], 1: []}

    def work(i: int) -> None:
        for _ in range(15):
            results[i].append(torch.equal(out(model, examples[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [True] * 15, 1: [True] * 15}


def test_a_contraction_without_its_expansion_raises() -> None:
    model = convert("encoder_layer", COPIES, zoo.model("encoder_layer"))
    with pytest.raises(RuntimeError, match="a contraction ran without its expansion"):
        model.linear2(torch.zeros(2, 7, 0))


def test_an_interrupted_forward_leaves_a_model_that_can_be_copied() -> None:
    model = convert("encoder_layer", COPIES, zoo.model("encoder_layer"))
    x = torch.randn(2, 7, zoo.D, requires_grad=True)
    model.linear1(x * 2)
    again = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    with pytest.raises(RuntimeError, match="without its expansion"):
        again.linear2(torch.zeros(2, 7, 0))


def test_a_tied_router_trains_where_a_layer_runs_twice() -> None:
    router = {"method": "avg_key", "top_k": 2, "weights": "softmax", "tied": True}
    recipe = Recipe.model_validate({"experts": {"method": "random", "count": 4}, "router": router})
    dense = zoo.model("called_twice")
    model = convert("called_twice", recipe, dense).train()
    model(torch.randn(3, zoo.D)).sum().backward()
    (layer,) = layers_of(model)
    assert layer.experts.down_proj.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("opt", "eager"),
        ("bert", "eager"),
        ("encoder_layer", "aot_eager"),
        ("fused_inline", "aot_eager"),
        ("llama", "eager"),
        ("sequential", "inductor"),
    ],
)
def test_compilation_in_one_graph(name: str, backend: str) -> None:
    dense = zoo.model(name)
    example = zoo.inputs(name)
    model = convert(name, COPIES, dense)
    expected = out(model, example)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert relative(out(compiled, example), expected) < RELATIVE
    assert relative(out(compiled, example), expected) < RELATIVE
    zoo.run(compiled, example).sum().backward()
    for module in model.modules():
        stored = [v for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
        assert not stored
    assert torch.equal(out(copy.deepcopy(model), example), expected)
    torch.save(model, io.BytesIO())
    assert torch.equal(out(model, example), expected)
    torch.compiler.reset()


def test_export_in_one_graph() -> None:
    for name in ("encoder_layer", "sequential"):
        model = convert(name, COPIES, zoo.model(name))
        example = zoo.inputs(name)
        assert isinstance(example, tuple)
        exported = torch.export.export(model, example, strict=False)
        assert relative(exported.module()(*example), out(model, example)) < RELATIVE
