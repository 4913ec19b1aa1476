"""Near ties between experts, which two runs of a model may decide in two ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

import upcycle
from upcycle.data.verification_inputs import Evaluation
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.config import SelectConfig
from upcycle.layers.moe import MoE
from upcycle.layers.selection import select as chosen_by
from upcycle.recipe.schema import Recipe
from upcycle.verification import files
from upcycle.verification.checks import ONNX, ONNX_TIES, RELOADED, TIES
from upcycle.verification.near_ties import choices_of, following
from upcycle.verification.onnx.files import verify_onnx

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
# Random rows of 16 products: two float32 sums in other orders are within 16 eps of their sizes.
NEAR = 16 * EPS


def recipe(rule: str = "one", select: dict[str, Any] | None = None, **router: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "experts": {"method": "contiguous", "count": 4},
            "router": {"method": "normal", "std": 1.0, "top_k": 1, "weights": rule, **router},
            "verify": {"max_relative_error": 100.0},
        }
    )


def converted(made: Recipe, dtype: torch.dtype = torch.float32) -> tuple[Any, list[MoE]]:
    done = upcycle.convert(small_models.build("llama").to(dtype), made)
    return done, [m for m in done.model.modules() if isinstance(m, MoE)]


def tie(layers: list[MoE]) -> None:
    """Experts 0 and 1, and 2 and 3, get rows that differ in the last bits."""
    draw = torch.Generator().manual_seed(1)
    for layer in layers:
        rows = layer.router.weight.data
        noise = torch.randn(rows[::2].shape, generator=draw)
        rows[1::2] = rows[::2] * (1 + EPS * noise)


def checks(done: Any, directory: Path, *targets: str) -> dict[str, Any]:
    done.save(directory, targets=targets)
    return {check.what: check for check in done.report.checks}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[MoE], Path, dict[str, Any]]:
    """A conversion, its layers, its directory and the checks; the tests leave it as it is."""
    done, layers = converted(recipe())
    tie(layers)
    directory = tmp_path_factory.mktemp("tied") / "out"
    return done, layers, directory, checks(done, directory, "safetensors", "onnx")


def test_onnx_files_may_decide_near_ties_otherwise(tied: Any) -> None:
    found = tied[3]
    assert found[ONNX].passed
    assert 0 < found[ONNX_TIES].elsewhere < found[ONNX_TIES].tokens
    assert 0 < found[ONNX_TIES].error <= NEAR


def test_another_router_is_no_near_tie(tied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done, layers, directory, _ = tied
    evaluation = Evaluation([{"input_ids": torch.arange(40)[None]}])
    weight = layers[1].router.weight
    monkeypatch.setattr(weight, "data", -weight.data)
    found = {c.what: c for c in verify_onnx(directory, done.model, evaluation)}
    assert not found[ONNX_TIES].passed
    assert found[ONNX_TIES].error > 1e-2


def test_other_weights_of_the_same_experts_are_no_near_tie(
    tied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, layers, directory, _ = tied
    evaluation = Evaluation([{"input_ids": torch.arange(40)[None]}])
    weight = layers[1].experts.down_proj
    monkeypatch.setattr(weight, "data", 1.01 * weight.data)
    found = {c.what: c for c in verify_onnx(directory, done.model, evaluation)}
    assert found[ONNX_TIES].passed
    assert not found[ONNX].passed


def test_native_files_in_bfloat16_decide_near_ties_otherwise(tmp_path: Path) -> None:
    """Their routers compute in bfloat16 in transformers, and here in float32."""
    done, layers = converted(recipe("renormalised"), torch.bfloat16)
    for layer in layers:
        rows = layer.router.weight.data
        rows[1::2] = rows[::2] * (1 + 2**-7)  # a few bits of bfloat16
    found = checks(done, tmp_path / "out", "safetensors")
    assert done.report.checks
    assert found[RELOADED].passed
    assert 0 < found[TIES].elsewhere < found[TIES].tokens


def test_choices_are_seen_beside_shared_experts() -> None:
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
    )
    model = Glm4MoeForCausalLM(config).eval()
    layers = converted(recipe())[1]
    with choices_of(model, layers) as choices:
        model(torch.arange(10)[None])
    assert choices is not None
    for layer in layers:
        (mask_TE,) = choices[layer]
        assert mask_TE.sum(-1).tolist() == [2] * 10


@pytest.mark.parametrize(
    "select",
    [
        SelectConfig(rule="top_k", k=2),
        SelectConfig(rule="top_p", k=4, mass=0.6),
        SelectConfig(rule="entropy", k=1, mass=0.6, above=0.7, q=1.5),
        SelectConfig(rule="expert_choice", k=2),
        SelectConfig(rule="null", k=3, nulls=2),
    ],
    ids=lambda select: select.rule,
)
def test_every_rule_knows_its_near_ties(select: SelectConfig) -> None:
    """Scores that are a little off decide otherwise; following them is explained by that much."""
    layer = tiny_layer(select)
    draw = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4000, 4 + select.nulls, generator=draw)
    off = 1e-3 * logits_TE.abs().max()
    other_TE = logits_TE + off * (2 * torch.rand(logits_TE.shape, generator=draw) - 1)
    want_TE = mask(chosen_by(other_TE, select), 4)
    with following({layer: [want_TE]}) as seen:
        followed = layer.router.choose(logits_TE)
    assert torch.equal(mask(followed, 4), want_TE)
    own_TE = mask(layer.router.choose(logits_TE), 4)
    assert seen.tokens == len(logits_TE)
    assert seen.elsewhere == (own_TE != want_TE).any(-1).sum() > 0
    assert seen.apart <= 4e-3
    with following({layer: [want_TE.roll(1, 0)]}) as wrong:  # choices of other tokens
        layer.router.choose(logits_TE)
    assert wrong.apart > 0.1


def tiny_layer(select: SelectConfig) -> MoE:
    layer = converted(recipe())[1][0]
    layer.router.config = replace(layer.router.config, select=select)
    return layer


def mask(chosen: tuple[torch.Tensor, torch.Tensor | None], count: int) -> torch.Tensor:
    index_TK, kept_TK = chosen
    kept_TK = torch.ones_like(index_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    return torch.zeros(len(index_TK), count, dtype=torch.bool).scatter(-1, index_TK, kept_TK)


@pytest.fixture
def near_rounding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A converted model in whose place files would be refused for any rounding at all: as if it
    magnified it."""
    sets = ["experts.count=4", "router.top_k=2", "verify.max_relative_error=99"]
    done = upcycle.convert(small_models.build("llama"), "drop-upcycling", overrides=sets)
    monkeypatch.setitem(ROUNDING, torch.float32, 1e-10)
    return done


def test_rounding_that_the_model_magnifies_is_not_held_against_its_files(
    near_rounding: Any, tmp_path: Path
) -> None:
    found = checks(near_rounding, tmp_path / "out", "safetensors")[RELOADED]
    assert found.passed
    assert 1e-10 < found.error <= found.allowed < 1e-5


def test_wrong_weights_in_the_files_of_such_a_model_are(
    near_rounding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*args: Any, **options: Any) -> Any:
        model: Any = upcycle.load(*args, **options)
        model.model.layers[0].mlp.experts.down_proj.data.mul_(1.01)
        return model

    monkeypatch.setattr(files, "load", damaged)
    with pytest.raises(upcycle.VerificationError, match=RELOADED):
        near_rounding.save(tmp_path / "out", targets=["safetensors"])
