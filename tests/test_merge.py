"""A mixture of experts as a dense model again.

Shape suffixes: E experts.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_moes
import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner, Result
from torch import nn

import upcycle
from upcycle.cli.main import main
from upcycle.errors import UnsupportedError
from upcycle.layers.moe import all_experts
from upcycle.operations.merge import Merged, merge
from upcycle.routing.trace import Trace

EPS = torch.finfo(torch.float32).eps
ROUNDING = 30 * 8 * EPS  # as in test_routing.py
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
INPUTS = [{"input_ids": TOKENS}]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def traced(model: Any) -> Trace:
    with upcycle.trace(model) as seen:
        logits(model)
    return seen.result()


def merged(model: Any, **options: Any) -> Merged:
    return merge(model, INPUTS, traced(model), **options)


def converted(recipe: str, *sets: str, kind: str = "llama") -> Any:
    sets = ("verify.max_relative_error=99", *sets)
    return upcycle.convert(small_models.build(kind), recipe, overrides=sets)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with all of its weights moved."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += 0.1 * parameter.abs().mean() * noise
    return model


# Exact


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", ["sparse-upcycling", "emoe", "moefication", "cmoe"])
def test_before_training_it_is_the_dense_model_bit_for_bit(recipe: str, kind: str) -> None:
    if (recipe, kind) == ("cmoe", "gpt2"):
        pytest.skip("cmoe takes gated FFNs alone")
    result = converted(recipe, "layers.every=1", "layers.skip_first=0", kind=kind)
    found = merged(result.model, provenance=result.provenance)
    assert found.kind == ("copies" if recipe == "sparse-upcycling" else "split")
    assert_same_weights(found.model, small_models.build(kind))


def test_slices_of_copies_are_the_dense_model_to_rounding() -> None:
    result = converted("granular")
    found = merged(result.model, provenance=result.provenance)
    assert found.kind == "copies"
    assert_close(logits(found.model), logits(small_models.build("llama")))


@pytest.mark.parametrize("recipe", ["emoe", "moefication"])
@pytest.mark.parametrize("known", [True, False])
def test_after_training_a_split_is_all_of_its_experts(recipe: str, known: bool) -> None:
    """Without provenance the neurons are in another order, which changes no sum."""
    result = converted(recipe, "layers.every=1", "layers.skip_first=0")
    trained(result.model)
    found = merged(result.model, provenance=result.provenance if known else None)
    with all_experts(result.model):
        assert_close(logits(found.model), logits(result.model))
    difference = (logits(found.model) - logits(result.model)).abs().max()
    assert difference > 100 * ROUNDING  # some of its experts are something else


def test_copies_that_all_moved_alike_are_still_exact() -> None:
    result = converted("sparse-upcycling")
    with torch.no_grad():
        for name, parameter in result.model.named_parameters():
            if "experts" in name or "norm" in name:
                parameter *= 1.25
    found = merged(result.model)
    assert found.kind == "copies"
    assert_close(logits(found.model), logits(result.model))


def test_each_expert_with_its_own_output_bias() -> None:
    result = converted("sparse-upcycling", kind="gpt2")
    assert any(name.endswith("down_proj_bias") for name, _ in result.model.named_parameters())
    found = merged(result.model)
    assert_same_weights(found.model, small_models.build("gpt2"))


# Means


def drifted() -> Any:
    return trained(converted("sparse-upcycling", "router.top_k=2", "experts.count=4").model)


def test_experts_that_differ_are_refused_unless_a_mean_is_asked_for() -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp: .* drifted apart .* `mean`"):
        merged(drifted())


def test_a_mean_is_the_mean() -> None:
    model = drifted()
    found = merged(model, by="mean")
    assert found.kind == "mean"
    for number, layer in enumerate(model.model.layers):
        mlp: Any = found.model.get_submodule(f"model.layers.{number}.mlp")
        expected = layer.mlp.experts.down_proj.mean(0)
        assert (mlp.down_proj.weight - expected).abs().max() <= 4 * EPS * expected.abs().max()
        gate, up = layer.mlp.experts.gate_up_proj.mean(0).chunk(2)
        for ours, theirs in ((mlp.gate_proj, gate), (mlp.up_proj, up)):
            assert (ours.weight - theirs).abs().max() <= 4 * EPS * theirs.abs().max()


def test_by_use_each_expert_counts_by_its_weights() -> None:
    model = drifted()
    trace = traced(model)
    found = merge(model, INPUTS, trace, by="use")
    mass_E = torch.zeros(4, dtype=torch.float64)
    index = torch.from_numpy(trace.index[0]).long().flatten()
    mass_E.index_add_(0, index, torch.from_numpy(trace.weights[0]).double().flatten())
    share_E = (mass_E / mass_E.sum()).float()
    expected = torch.einsum("e,eoi->oi", share_E, model.model.layers[0].mlp.experts.down_proj)
    ours: Any = found.model.get_submodule("model.layers.0.mlp.down_proj")
    assert (ours.weight - expected).abs().max() <= 8 * EPS * expected.abs().max()


def test_an_expert_that_gets_all_is_taken_alone() -> None:
    model = drifted()
    with upcycle.override(model, force={(0, 2), (1, 2)}, scale={}), upcycle.trace(model) as seen:
        logits(model)
    trace = seen.result()
    alone = tuple(
        (index == 2) * weights for index, weights in zip(trace.index, trace.weights, strict=True)
    )
    found = merge(model, INPUTS, replace(trace, weights=alone), by="use")
    total = float(torch.from_numpy(alone[0]).sum(1).mean())
    ours: Any = found.model.get_submodule("model.layers.0.mlp.down_proj")
    expected = model.model.layers[0].mlp.experts.down_proj[2] * total
    assert (ours.weight - expected).abs().max() <= 8 * EPS * expected.abs().max()


# Native models

NOT_MERGED = {
    **dict.fromkeys(("Qwen2Moe", "Ernie4_5_Moe", "HunYuanMoEV1", "Glm4Moe"), "shared expert"),
    "Olmoe": "another model",  # norms elsewhere than in a dense OLMo 2
    "GptOss": "no place for swiglu_alpha",
    "MiniMax": "no dense architecture is known",
}


@pytest.mark.parametrize("family", native_moes.FAMILIES)
def test_a_native_model_has_a_mean_or_a_reason(family: str) -> None:
    model = native_moes.native(family)
    if family in NOT_MERGED:
        with pytest.raises(UnsupportedError, match=NOT_MERGED[family]):
            merged(model, by="mean")
        return
    found = merged(model, by="mean")
    # The rest of the model is the same: with these FFNs for layers it computes the same.
    assert found.off is not None
    assert found.off <= ROUNDING


def test_a_window_that_llama_has_not_makes_it_a_mistral() -> None:
    found = merged(native_moes.native("Mixtral", sliding_window=4), by="mean")
    assert isinstance(found.model, transformers.MistralForCausalLM)
    assert found.model.config.sliding_window == 4


def test_another_dense_architecture_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that computes something else than Llama outside its experts."""
    model = native_moes.native("Mixtral")
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    with pytest.raises(UnsupportedError, match="another model"):
        merged(model, by="mean")


def test_a_low_rank_term_is_refused() -> None:
    result = converted("upcycle", "layers.skip_first=0", "layers.skip_last=0")
    with pytest.raises(UnsupportedError, match="low-rank"):
        merged(result.model, provenance=result.provenance)


def test_slices_without_provenance_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no provenance\.json"):
        merged(converted("granular").model)


# Directories


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama, and what converts to a native one, to custom code, and to a split."""
    root = tmp_path_factory.mktemp("merge")
    small_models.build("llama").save_pretrained(root / "dense")
    for name, recipe in (
        ("native", "sparse-upcycling"),
        ("split", "emoe"),
        ("drop", "drop-upcycling"),
    ):
        sets = ["layers.skip_first=0", "layers.every=1"] if name == "split" else []
        options = [part for one in sets for part in ("--set", one)]
        done = run(
            "convert",
            root / "dense",
            "--recipe",
            recipe,
            "--out",
            root / name,
            *options,
            "--set",
            "verify.max_relative_error=99",
            "--target",
            "safetensors",
        )
        assert done.exit_code == 0, done.output
    return root


@pytest.mark.parametrize("name", ["native", "split"])
def test_the_command_gives_the_dense_files_back(name: str, folder: Path, tmp_path: Path) -> None:
    done = run("merge", folder / name, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["kind"] == ("copies" if name == "native" else "split")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert_same_weights(again, transformers.AutoModelForCausalLM.from_pretrained(folder / "dense"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name in config if "expert" in name or "upcycle" in name]


def test_the_command_refuses_and_says_what_a_mean_costs(folder: Path, tmp_path: Path) -> None:
    refused = run("merge", folder / "drop", "--out", tmp_path / "out")
    assert refused.exit_code == 4
    assert "drifted apart" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run("merge", folder / "drop", "--out", tmp_path / "out", "--by", "mean")
    assert done.exit_code == 0, done.output
    assert "train it" in done.stdout
    assert "outputs moved by" in done.stdout
    dense = run("merge", folder / "dense", "--out", tmp_path / "other")
    assert dense.exit_code == 2
    assert "it is a dense model" in dense.stderr
