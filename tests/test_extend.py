"""One more expert: nothing changes until its bias is raised."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import native_moes
import numpy as np
import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner, Result
from onnx_case import moe

import upcycle
from upcycle.cli.main import main
from upcycle.operations.extend import add_nulls, layers_by_shift, layers_named
from upcycle.passes.extend import set_new_bias
from upcycle.routing.contract import routed_layers
from upcycle.routing.trace import Trace

TOKENS = torch.arange(60).reshape(3, 20)
BATCHES = [{"input_ids": TOKENS}]


def mixture(name: str = "llama", *overrides: str) -> Any:
    """A converted model whose experts differ from each other."""
    done = upcycle.convert(
        small_models.build(name),
        "drop-upcycling",
        verify=False,
        overrides=["experts.count=4", "router.std=1", *overrides],
    )
    return done.model.eval()


def logits(model: Any) -> torch.Tensor:
    """One expert after the other: with more experts the other kernels may round otherwise."""
    for module in model.modules():
        if hasattr(module, "eager_forward"):
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=TOKENS).logits
    return out


def layers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, upcycle.MoE)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_nothing_changes_until_the_bias_is_raised(name: str, top_k: int) -> None:
    model = mixture(name, f"router.top_k={top_k}")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    extended = upcycle.extend(model, BATCHES)
    assert torch.equal(logits(extended), logits(model))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert torch.equal(extended.state_dict()[key][: len(tensor)], tensor)
    set_new_bias(extended, 0.0)
    for layer in layers_of(extended):
        layer.router.bias.data[-1] = 3.0
    assert (logits(extended) - logits(model)).abs().max() > 1e-3


def test_the_new_expert_is_a_copy_of_the_most_visited_one() -> None:
    model = mixture()
    seen: list[torch.Tensor] = []
    layer = layers_of(model)[1]
    handle = layer.router.register_forward_hook(lambda *args: seen.append(args[2][2]))
    logits(model)
    handle.remove()
    most = int(torch.bincount(seen[0].flatten(), minlength=4).argmax())
    extended = layers_of(upcycle.extend(model, BATCHES))[1]
    assert torch.equal(extended.experts.down_proj[4], layer.experts.down_proj[most])
    assert torch.equal(extended.experts.up_EGD[4], layer.experts.up_EGD[most])
    assert torch.equal(extended.router.weight[4], layer.router.weight[most])
    assert extended.router.bias.tolist() == [0, 0, 0, 0, -math.inf]


def test_a_tied_copy_without_the_bias_is_another_model() -> None:
    """Where the copied expert is the best one, both copies are chosen: what the bias is for."""
    model = mixture()
    assert (logits(upcycle.extend(model, BATCHES, bias=0.0)) - logits(model)).abs().max() > 1e-3


def test_it_trains_from_a_finite_bias() -> None:
    extended = upcycle.extend(mixture(), BATCHES).train()
    for bias in (-math.inf, -1.0):
        set_new_bias(extended, bias)
        extended.zero_grad()
        extended(input_ids=TOKENS, labels=TOKENS).loss.backward()
        experts = [layer.experts.down_proj.grad[4].abs().max() for layer in layers_of(extended)]
        assert all(
            torch.isfinite(p.grad).all() for p in extended.parameters() if p.grad is not None
        )
        assert any(g > 0 for g in experts) == (bias == -1.0)


def test_a_written_model_is_extended_and_written_again(tmp_path: Path) -> None:
    done = upcycle.convert(
        small_models.build("bert"), "drop-upcycling", overrides=["experts.count=4"]
    )
    done.save(tmp_path / "moe")
    loaded: Any = upcycle.load(tmp_path / "moe")
    one = "bert.encoder.layer.1.output.dense"
    extended = upcycle.extend(loaded, BATCHES, layers=[one])
    extended.save_pretrained(tmp_path / "extended")
    again = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "extended", trust_remote_code=True
    ).eval()
    assert again.get_submodule(one).experts.down_proj.shape[0] == 5
    assert again.get_submodule(one.replace("1", "0")).experts.down_proj.shape[0] == 4
    assert torch.equal(logits(again), logits(loaded))
    set_new_bias(again, 0.5)
    biases = [m.router.bias for m in again.modules() if type(m).__name__ == "TappedMoE"]
    assert [b is None or b.tolist() for b in biases] == [True, [0, 0, 0, 0, 0.5]]


@pytest.mark.usefixtures("own_kernels")
def test_layers_of_a_file_that_an_earlier_version_wrote() -> None:
    """Their configuration is plain data, and their code reads it as such."""
    path = Path(__file__).parent / "written_before/self_contained/modeling_upcycle.py"
    spec: Any = importlib.util.spec_from_file_location("written_before_modeling", path)
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    file.ROUTERS["linear"] = file.Router
    written = moe("relu", seed=1)
    layer = file.MoE(written.config.to_json())
    layer.load_state_dict(written.state_dict())
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(layer).eval()
    extended = upcycle.extend(model, [(x,)])
    with torch.no_grad():
        # The same sums of at most 32 products below 2, by another kernel: 2 * 32 * 2^-24 * 2.
        torch.testing.assert_close(extended(x), model(x), rtol=0, atol=1e-5)
        set_new_bias(extended, 9.0)
        assert (extended(x) - model(x)).abs().max() > 1e-3
    assert extended[0].config["router"] == extended[0].router.config
    assert extended[0].config["router"]["extended"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": []}, "UsageError", "there are no data"),
        ({"layers": ["lm_head"]}, "UsageError", "lm_head: no MoE layer of upcycle"),
    ],
)
def test_what_cannot_be_extended_is_said(options: Any, error: str, words: str) -> None:
    with pytest.raises(getattr(upcycle, error), match=words):
        upcycle.extend(mixture(), **{"batches": BATCHES, **options})


def test_other_models_and_routers_are_refused() -> None:
    with pytest.raises(upcycle.UsageError, match="the model has no MoE layer"):
        upcycle.extend(small_models.build("llama"), BATCHES)
    balanced = mixture("llama", "router.balance=true")
    with pytest.raises(upcycle.UnsupportedError, match=r"layers\.0\.mlp: only a layer that takes"):
        upcycle.extend(balanced, BATCHES)


# Native models

EPS = torch.finfo(torch.float32).eps
ROUNDING = 30 * 8 * EPS  # as in test_routing.py
WITH_BIAS = ("GptOss", "Glm4Moe")
REFUSED = {
    "Qwen2Moe": "more than experts and a linear router",  # a gate on a shared expert
    "HunYuanMoEV1": "more than experts and a linear router",
    "Ernie4_5_Moe": "choose by more than scores and a bias",  # a bias on a softmax
}


@pytest.mark.parametrize("family", native_moes.FAMILIES)
def test_a_native_model_is_extended_exactly_or_refused(family: str) -> None:
    model = native_moes.native(family)
    if family in REFUSED:
        with pytest.raises(upcycle.UnsupportedError, match=REFUSED[family]):
            upcycle.extend(model, BATCHES)
        return
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    extended = upcycle.extend(model, BATCHES)
    others = {
        "input_ids": torch.randint(3, 90, (4, 33), generator=torch.Generator().manual_seed(1))
    }
    with torch.no_grad():
        found, expected = extended(**others).logits, model(**others).logits
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    for layer, old in zip(routed_layers(extended), routed_layers(model), strict=True):
        assert (layer.num_experts, old.num_experts) == (9, 8)
        assert isinstance(layer.block, upcycle.MoE) == (family not in WITH_BIAS)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_new_expert_of_a_native_model_can_be_raised() -> None:
    model = native_moes.native("Mixtral")
    extended = upcycle.extend(model, BATCHES)
    set_new_bias(extended, 9.0)
    assert (logits(extended) - logits(model)).abs().max() > 1e3 * ROUNDING


def test_a_native_model_with_a_bias_has_one_number_of_experts() -> None:
    with pytest.raises(upcycle.UnsupportedError, match="one number of experts"):
        upcycle.extend(native_moes.native("Glm4Moe"), BATCHES, layers=["model.layers.0.mlp"])
    mixed = upcycle.extend(native_moes.native("Mixtral"), BATCHES, layers=["model.layers.0.mlp"])
    assert [layer.num_experts for layer in routed_layers(mixed)] == [9, 8]


def test_the_mean_of_all_experts() -> None:
    model = mixture()
    extended = upcycle.extend(model, BATCHES, like="mean")
    assert torch.equal(logits(extended), logits(model))
    for new, old in zip(layers_of(extended), layers_of(model), strict=True):
        assert torch.equal(new.experts.down_proj[4], old.experts.down_proj.mean(0))
        assert torch.equal(new.router.weight[4], old.router.weight.mean(0))


# Experts that do nothing


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("family", ["ours", "Mixtral"])
def test_nulls_change_nothing_before_training(family: str, copies: int) -> None:
    """8 nulls and 3 of all, 16 and 4: the two true experts that a token visited."""
    sets = ("router.top_k=2", "experts.count=8")
    model = mixture("llama", *sets) if family == "ours" else native_moes.native(family)
    extended = add_nulls(model, 8 * copies, BATCHES)
    found, expected = logits(extended), logits(model)
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    with upcycle.trace(extended) as seen:
        logits(extended)
    for layer, weights in zip(layers_of(extended), seen.result().weights, strict=True):
        assert layer.config.router.select.k == 2 + copies
        assert ((weights != 0).sum(1) == 2).all()
    for layer in layers_of(extended):
        layer.router.weight.data[8:] *= 2  # now nulls win, and tokens visit fewer experts
    with upcycle.trace(extended) as seen:
        logits(extended)
    assert ((seen.result().weights[0] != 0).sum(1) < 2).any()


def test_nulls_that_do_not_fit_are_refused() -> None:
    with pytest.raises(upcycle.UsageError, match="nulls: 6 is no multiple of the 4 experts"):
        add_nulls(mixture(), 6)
    with pytest.raises(upcycle.UnsupportedError, match="weights that sum to one"):
        add_nulls(mixture("llama", "router.weights=softmax"), 4)


# Which layers


def counts(*loads: list[int]) -> Trace:
    index = tuple(np.repeat(np.arange(len(load)), load).astype(np.int32)[:, None] for load in loads)
    weights = tuple(np.ones(i.shape, dtype=np.float32) for i in index)
    token = tuple(np.arange(len(i)) for i in index)
    paths = tuple(f"layers.{i}" for i in range(len(loads)))
    return Trace(paths, tuple(len(load) for load in loads), index, weights, token, token)


def test_by_shift_the_half_whose_load_moves_most() -> None:
    before = counts([5, 5], [5, 5], [5, 5], [2, 8])
    after = counts([5, 5], [9, 1], [6, 4], [20, 80])
    assert layers_by_shift(before, after) == ["layers.1", "layers.2"]


def test_layers_have_numbers_and_paths() -> None:
    model = mixture()
    paths = [layer.path for layer in routed_layers(model)]
    assert layers_named(model, "all") == paths
    assert layers_named(model, f"1, {paths[0]}") == [paths[1], paths[0]]
    with pytest.raises(upcycle.UsageError, match="layers: 7: the model has layers 0 to 1"):
        layers_named(model, "0,7")


# The command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_extends_native_files(tmp_path: Path) -> None:
    model = native_moes.native("Mixtral")
    model.save_pretrained(tmp_path / "moe")
    small_models.tokenizer().save_pretrained(tmp_path / "moe")
    text = tmp_path / "law.txt"
    text.write_text("The court held that the contract was void. " * 200)
    done = run("extend", tmp_path / "moe", "--data", text, "--layers", "1", "--out", tmp_path / "x")
    assert done.exit_code == 0, done.output
    assert "1 layers" not in done.stdout
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", trust_remote_code=True
    ).eval()
    found, expected = logits(again), logits(model)
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    shift = run(
        "extend", tmp_path / "x", "--data", text, "--layers", "shift", "--out", tmp_path / "y"
    )
    assert shift.exit_code == 0, shift.output
    nulls = run("extend", tmp_path / "moe", "--nulls", 8, "--out", tmp_path / "n", "--json")
    assert nulls.exit_code == 0, nulls.output
    for arguments, said in (
        (("--layers", "shift"), "give --data"),
        (("--layers", "9"), "the model has layers 0 to 1"),
        (("--nulls", "3"), "no multiple"),
    ):
        refused = run("extend", tmp_path / "moe", *arguments, "--out", tmp_path / "no")
        assert refused.exit_code == 2, refused.output
        assert said in refused.stderr
        assert not (tmp_path / "no").exists()
