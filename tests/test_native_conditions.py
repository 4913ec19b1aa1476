"""Native forms that are right under a condition: no two scores tie, or no gain was trained."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_models
import numerics
import pytest
import torch
import transformers
from native_case import (
    COPIES,
    SLICES,
    distinct,
    logits,
    plan_of,
    reference,
    refusal,
    target_of,
    write,
)
from native_case import relative as relative_error
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter

from upcycle import convert, load
from upcycle.errors import UnsupportedError
from upcycle.ir.layer_weights import weights_of
from upcycle.ir.spec import Plan
from upcycle.targets.files.read_back import read_by_name, read_layer
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.fold_layer import folded
from upcycle.targets.native.fold_router import HOT, Fold, fold

BEST = {"top_k": 1, "weights": "one"}


def switch() -> tuple[Plan, NativeTarget, Fold]:
    plan = plan_of("t5", SLICES, BEST, "switch_transformers")
    target = target_of("t5", plan)
    made = fold(target, plan.specs[0])
    assert isinstance(made, Fold)
    assert made.needs == "distances"
    return plan, target, made


def weights_of_the_best(times: float) -> torch.Tensor:
    """Of Switch: the softmax in float32, for 100 000 tokens and 8 experts."""
    draw = torch.Generator().manual_seed(0)
    weight_ED = 0.02 * torch.randn(8, 256, generator=draw)
    x_TD = torch.randn(100_000, 256, generator=draw)
    return (x_TD @ (weight_ED * times).t()).softmax(-1).amax(-1)


def test_a_hot_router_gives_the_best_expert_everything() -> None:
    """Ten thousand is not enough: the two best logits of some tokens are nearer than a softmax."""
    assert torch.equal(weights_of_the_best(HOT), torch.ones(100_000))
    lukewarm = weights_of_the_best(1e4)
    assert (lukewarm < 1 - 1e-3).float().mean() > 1e-3
    assert lukewarm.min() < 0.9


def test_it_is_written_on_request_alone() -> None:
    plan, _, _ = switch()
    config = native_models.dense_model("t5").config
    reason = refusal(NATIVE["switch_transformers"], config, plan)
    assert "only while no two scores tie; ask for it with `architecture=" in str(reason)


@pytest.mark.parametrize("case", ["rows", "float16"])
def test_a_router_without_a_best_expert_is_refused(case: str) -> None:
    plan, target, made = switch()
    weights = distinct(plan.specs[0])
    folded(weights, made, target, plan.specs[0])
    if case == "rows":
        weights.router["weight"][3] = weights.router["weight"][1]
    else:
        half = weights.experts.down_EOI.half()
        weights = replace(weights, experts=replace(weights.experts, down_EOI=half))
    with pytest.raises(UnsupportedError, match=r"equal router rows|are float16"):
        folded(weights, made, target, plan.specs[0])


def saved(name: str, architecture: str, router: dict[str, Any], folder: Path) -> Any:
    recipe = numerics.make_recipe(SLICES, {"method": "normal", "std": 0.3, **router})
    loose = recipe.verify.model_copy(update={"max_relative_error": 4.0})  # one slice of four
    recipe = recipe.model_copy(update={"verify": loose})
    dense = copy.deepcopy(native_models.dense_model(name))
    done = convert(dense, recipe, native_models.inputs(name))
    done.save(folder, architecture=architecture)
    return done


def test_a_switch_is_saved_verified_and_opened_again(tmp_path: Path) -> None:
    done = saved("t5", "switch_transformers", BEST, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    checks = {c["what"]: c for c in report["checks"]}
    assert checks["files loaded again"]["error"] < 1e-5
    expected = logits(done.model, "t5")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert relative_error(logits(theirs, "t5"), expected) < 1e-5
    assert relative_error(logits(load(tmp_path / "out"), "t5"), expected) < 1e-5
    plan, target, _ = switch()
    again = read_layer(target, plan.specs[0], read_by_name(tmp_path / "out"))
    written = weights_of(done.model.get_submodule(plan.specs[0].ffn.place)).experts
    assert torch.equal(again.experts.up_EGD, written.up_EGD)
    assert torch.equal(again.experts.down_EOI, written.down_EOI)


def test_gains_that_were_trained_are_refused(tmp_path: Path) -> None:
    router = {"top_k": "all", "weights": "gain"}
    plan = plan_of("llama", SLICES, router, "mixtral")
    config = native_models.dense_model("llama").config
    assert "it has no gains" in str(refusal(NATIVE["mixtral"], config, plan))
    done = saved("llama", "mixtral", router, tmp_path / "out")
    layer = done.model.model.layers[1].mlp
    with torch.no_grad():
        layer.router.gain[2] = 0.1
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp: the experts have gains by now"):
        done.save(tmp_path / "again", architecture="mixtral")


def test_a_detached_sum_is_held_on_request(tmp_path: Path) -> None:
    plan = plan_of("llama", COPIES, {"top_k": 2, "weights": "renorm_detach"}, "mixtral")
    moe = write(tmp_path, "llama", plan, target_of("llama", plan), random=True)
    assert relative_error(logits(moe, "llama"), logits(reference("llama", plan), "llama")) < 1e-5
    config = native_models.dense_model("llama").config
    assert "another gradient" in str(refusal(NATIVE["mixtral"], config, plan))


def glm_weights(count: int, **fields: Any) -> torch.Tensor:
    """Of a router of zeros in transformers, all experts visited."""
    config = Glm4MoeConfig(
        n_routed_experts=count, num_experts_per_tok=count, hidden_size=8, n_group=1, **fields
    )
    _, weights_TK, _ = Glm4MoeTopkRouter(config)(torch.randn(3, 8))
    return weights_TK


def test_half_of_two_is_one_to_the_bit() -> None:
    """And the sum of 41 halves, divided and multiplied again, is not."""
    for count in (3, 8, 41):
        weights = glm_weights(count, norm_topk_prob=False, routed_scaling_factor=2.0)
        assert torch.equal(weights, torch.ones(3, count))
    assert (glm_weights(41, norm_topk_prob=True, routed_scaling_factor=41.0) != 1).all()


@pytest.mark.parametrize("name", ["glm4_moe", "dots1", "solar_open"])
def test_all_three_have_it(name: str) -> None:
    plan = plan_of(
        "qwen3-sliding" if name == "dots1" else "llama",
        SLICES,
        {"top_k": "all", "weights": "one", "scale": 1.7},
        name,
    )
    first = fold(NATIVE[name], plan.specs[0])
    assert isinstance(first, Fold)
    assert first.config == {"norm_topk_prob": False, "routed_scaling_factor": 3.4}
    assert (first.router, first.down, first.is_exact) == (0, 1, True)
