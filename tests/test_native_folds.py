"""What a native router cannot do by itself: folded exactly, tempered on request, or refused."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_models
import numerics
import pytest
import torch
from native_case import (
    COPIES,
    SHARED,
    SLICES,
    ZEROS,
    converted,
    distinct,
    logits,
    plan_of,
    reference,
    refusal,
    relative,
    target_of,
    write,
)
from transformers import AutoModelForCausalLM, LlamaConfig, M2M100Config, Olmo2Config

from upcycle import convert
from upcycle.errors import UnsupportedError
from upcycle.ir.spec import Plan
from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.passes.plan.plan import make_plan
from upcycle.targets.files.tensor_file import write_tensors
from upcycle.targets.native import NATIVE
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.choose import build_config, choose
from upcycle.targets.native.fold_layer import folded, gate_noise, unfolded
from upcycle.targets.native.fold_router import MOST_WEIGHT_ERROR, Fold, fold, temper
from upcycle.targets.native.tensors import entries

TWO_OF_FOUR = {"top_k": 2, "weights": "one", "std": 0.3}


def plan(
    experts: dict[str, Any], router: dict[str, Any], name: str = "llama", **changes: Any
) -> Plan:
    recipe = numerics.make_recipe(experts, {"method": "normal", **router})
    made = make_plan(native_models.located(name), recipe, recipe_name="test")
    return replace(made, **changes)


def config_of(name: str = "llama") -> Any:
    return native_models.dense_model(name).config


def test_exact_forms_come_before_requested_ones() -> None:
    """A split with k of E experts has no exact native form, so by default it gets none."""
    target, reasons = choose(NATIVE, config_of(), plan(SLICES, TWO_OF_FOUR))
    assert target is None
    assert "`architecture=mixtral`" in reasons["mixtral"]
    target, _ = choose(NATIVE, config_of(), plan(SLICES, TWO_OF_FOUR), only="mixtral")
    assert target is not None
    for experts, name in ((SLICES, "mixtral"), (SHARED, "granitemoeshared")):
        chosen, _ = choose(NATIVE, config_of(), plan(experts, {"top_k": "all", "weights": "one"}))
        assert chosen is not None
        assert chosen.model_type == name


def test_a_required_runtime_may_choose_a_form_and_an_output_matrix_of_its_own() -> None:
    """llama.cpp: qwen2moe does not divide the weights, and its output is not tied."""

    def accepts(_: Any, config: Any) -> str | None:
        if config["model_type"] != "qwen2_moe" or config["norm_topk_prob"]:
            return "it divides the weights"
        return "the output is tied" if config["tie_word_embeddings"] else None

    copies = plan(COPIES, {"top_k": 2, "weights": "renormalised"}, "qwen2-tied")
    target, _ = choose(NATIVE, config_of("qwen2-tied"), copies, accepts=accepts)
    assert target is None  # nothing was asked for that would justify it
    asked = replace(copies, runtimes=("llama.cpp",))
    target, _ = choose(NATIVE, config_of("qwen2-tied"), asked, accepts=accepts)
    assert target is not None
    assert target.untied


def test_an_untied_output_is_the_same_model(tmp_path: Path) -> None:
    copies = plan_of("qwen2-tied", COPIES, {"top_k": 2, "weights": "renormalised"}, "qwen2_moe")
    target = target_of("qwen2-tied", copies, tie_word_embeddings=False, norm_topk_prob=False)
    moe = write(tmp_path, "qwen2-tied", copies, target)
    dense = native_models.dense_model("qwen2-tied")
    assert relative(logits(moe, "qwen2-tied"), logits(dense, "qwen2-tied")) < 1e-5
    assert "lm_head.weight" in read_tensors(tmp_path / "moe")


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "granitemoe", "glm4_moe", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_tempered_router_has_weights_near_one(target: str, tmp_path: Path) -> None:
    """Within the stated bound of distinct experts with weight one, and not by mere luck."""
    split = plan_of("llama", SLICES, {"top_k": 2, "weights": "one"}, target)
    moe = write(tmp_path, "llama", split, target_of("llama", split), random=True)
    expected = logits(reference("llama", split), "llama")
    error = relative(logits(moe, "llama"), expected)
    assert 1e-5 < error < MOST_WEIGHT_ERROR
    other = plan_of("llama", SLICES, {"top_k": 2, "weights": "renormalised"}, target)
    assert relative(logits(reference("llama", other), "llama"), expected) > 5 * error


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_router_bias_becomes_a_selection_bias(tmp_path: Path) -> None:
    split = plan_of("llama", SLICES, {"top_k": 2, "weights": "one", "bias": True}, "glm4_moe")
    moe = write(tmp_path, "llama", split, target_of("llama", split), random=True)
    assert relative(logits(moe, "llama"), logits(reference("llama", split), "llama")) < 0.02
    moe.model.layers[0].mlp.gate.e_score_correction_bias.zero_()
    assert relative(logits(moe, "llama"), logits(reference("llama", split), "llama")) > 0.05


def test_a_tempered_model_is_saved_and_verified(tmp_path: Path) -> None:
    model = native_models.dense_model("llama")
    recipe = numerics.make_recipe(SLICES, {"method": "normal", **TWO_OF_FOUR})
    recipe = recipe.model_copy(
        update={"verify": recipe.verify.model_copy(update={"max_relative_error": 2.0})}
    )
    done = convert(copy.deepcopy(model), recipe, native_models.inputs("llama"))
    done.save(tmp_path / "out", architecture="mixtral")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    checks = {c["what"]: c for c in report["checks"]}
    assert checks["files loaded again"]["error"] < 1e-5
    assert 0 < checks["weights of a tempered router"]["error"] < MOST_WEIGHT_ERROR
    assert checks["tokens at other experts, by a tempered router"]["error"] == 0


def test_experts_that_differ_by_now_are_no_copies(tmp_path: Path) -> None:
    copies = plan_of("qwen2", COPIES, {"top_k": 2, "weights": "renormalised"}, "qwen2_moe")
    target = target_of("qwen2", copies, norm_topk_prob=False)
    with pytest.raises(UnsupportedError, match=r"mlp: the experts are not equal.*qwen2_moe"):
        write(tmp_path, "qwen2", copies, target, random=True)


def test_experts_that_are_trained_are_not_zero(tmp_path: Path) -> None:
    zeros = plan_of("smollm3", ZEROS, {"top_k": 1, "weights": "softmax"}, "llama4_text")
    with pytest.raises(UnsupportedError, match=r"the experts are not zero.*llama4_text"):
        write(tmp_path, "smollm3", zeros, target_of("smollm3", zeros), random=True)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "ernie4_5_moe", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_fold_is_undone(target: str, shared: int) -> None:
    if shared and NATIVE[target].shared is None:
        pytest.skip(f"{target} has no shared expert")
    split = plan({**SLICES, "shared": shared}, {**TWO_OF_FOUR, "scale": 1.7})
    spec = split.specs[0]
    native = target_of("llama", replace(split, architecture=target))
    made = fold(native, spec)
    assert isinstance(made, Fold)
    weights = distinct(spec)
    again = unfolded(folded(weights, made, native, spec), made, native, spec)
    small = temper(weights.router["weight"])  # the order of the experts is all that is left
    weights.router["weight"].mul_(small)
    # A down projection is multiplied by 1.7 k and divided by it: two roundings of eps / 2 each,
    # so that it is off by eps and the square of half of it. All else is a power of two.
    bound = (1 + torch.finfo(torch.float32).eps / 2) ** 2 - 1
    for name, tensor in weights.tensors().items():
        rtol = bound if name == "experts.down_proj" else 0
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_of_the_shared_expert_is_nowhere_zero(dtype: torch.dtype) -> None:
    """llama.cpp computes silu(x) / x. The sigmoid is a half all the same."""
    gate = gate_noise((1, 4096), dtype, torch.Generator().manual_seed(0))
    assert (gate != 0).all()
    assert gate.abs().max() < 1e-7


REFUSALS: dict[str, tuple[str, Any, str]] = {
    "olmoe": ("olmoe", Olmo2Config(**native_models.SIZES), "its norms stand before"),
    "nllb": ("nllb_moe", M2M100Config(), "only its first two experts"),
    "qk-norm": ("qwen3_moe", LlamaConfig(**native_models.SIZES), "the dense model is llama"),
    "windows": ("glm4_moe", native_models.CONFIGS["qwen3-sliding"](), "sliding window"),
    "biases": ("ernie4_5_moe", native_models.CONFIGS["llama-bias"](), "attention_bias is true"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_an_architecture_cannot_hold_is_refused(case: str) -> None:
    target, config, reason = REFUSALS[case]
    copies = plan(COPIES, {"top_k": 2, "weights": "renormalised"})
    assert reason in str(refusal(NATIVE[target], config, copies, asked=True))


PLANS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "sigmoid": ("glm4_moe", SLICES, {"top_k": 2, "weights": "renormalised"}, "does not follow"),
    "input": ("llama4_text", SHARED, {"top_k": 2, "weights": "one"}, "only `zero_routed`"),
    "shared": ("mixtral", SHARED, {"top_k": 2, "weights": "one"}, "no shared expert"),
    "softmax": ("glm4_moe", COPIES, {"top_k": 2, "weights": "softmax"}, "does not follow"),
    "hash": ("mixtral", SLICES, {"method": "hash", "top_k": 1, "weights": "one"}, "is linear"),
    "balance": (
        "mixtral",
        SLICES,
        {"top_k": 2, "weights": "renormalised", "balance": True},
        "the best `top_k`",
    ),
    "narrow": (
        "mixtral",
        {**SLICES, "count": 24},
        {"top_k": 2, "weights": "one"},
        "multiples of 4",
    ),
    "hunyuan": ("hunyuan_v1_moe", COPIES, {"top_k": 2, "weights": "renormalised"}, "as wide as"),
}
HELD = {"llama4_text": "smollm3", "hunyuan_v1_moe": "hunyuan"}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_no_form_holds_is_refused_with_the_reason(case: str) -> None:
    target, experts, router, reason = PLANS[case]
    name = HELD.get(target, "llama")
    assert reason in str(
        refusal(NATIVE[target], config_of(name), plan(experts, router, name), asked=True)
    )


def test_layers_may_stay_dense_where_the_config_can_say_so() -> None:
    def some(*layers: int) -> Plan:
        whole = plan(COPIES, {"top_k": 1, "weights": "renormalised"})
        return replace(whole, specs=tuple(whole.specs[i] for i in layers))

    last, first, middle, ends = some(1, 2), some(0, 1), some(1), some(0, 2)
    assert refusal(NATIVE["glm4_moe"], config_of(), last) is None
    assert "layer 2 dense" in str(refusal(NATIVE["glm4_moe"], config_of(), first))
    assert refusal(NATIVE["ernie4_5_moe"], config_of(), middle) is None
    assert "layer 1 dense" in str(refusal(NATIVE["ernie4_5_moe"], config_of(), ends))
    assert refusal(NATIVE["qwen2_moe"], config_of(), ends) is None
    assert "leaves these dense: 1" in str(refusal(NATIVE["granitemoe"], config_of(), ends))


def test_a_unit_norm_of_queries_and_keys_is_no_identity(tmp_path: Path) -> None:
    """Negative control: Llama's weights in qwen3_moe, with norms of one, are another model."""
    wrong = replace(
        NATIVE["qwen3_moe"], sources={"llama": replace(NATIVE["mixtral"].sources["llama"])}
    )
    copies = plan(COPIES, {"top_k": 2, "weights": "renormalised"}, "llama-tied")
    assert differs(tmp_path, "llama-tied", wrong, copies) > 0.1


def test_norms_before_are_not_norms_after(tmp_path: Path) -> None:
    """Negative control: OLMo 2 in olmoe."""
    forms = NATIVE["flex_olmo"]
    wrong = replace(forms, model_type="olmoe", architecture="OlmoeForCausalLM")
    copies = plan(COPIES, {"top_k": 2, "weights": "renormalised"}, "olmo2")
    assert differs(tmp_path, "olmo2", wrong, copies) > 0.1


def differs(directory: Path, name: str, target: NativeTarget, copies: Plan) -> float:
    """How far the forced model is from the dense one; what the files lack is as made by default."""
    dense = native_models.dense_model(name)
    (directory / "moe").mkdir()
    config = build_config(target, dense.config, copies)
    (directory / "moe" / "config.json").write_text(json.dumps(config))
    tensors = {key: t.detach() for key, t in dense.named_parameters()}
    written = entries(target, tensors, copies, lambda spec: converted(spec, name), dense.config)
    write_tensors(directory / "moe", written)
    loaded = AutoModelForCausalLM.from_pretrained(directory / "moe").eval()
    return relative(logits(loaded, name), logits(dense, name))


def test_the_documentation_has_every_architecture() -> None:
    text = (Path(__file__).parents[1] / "docs" / "native.md").read_text("utf-8").split("## How")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, flags=re.M))
    held = {
        name: "none" if target.refused else ", ".join(target.sources)
        for name, target in NATIVE.items()
    }
    assert list(rows.items()) == list(held.items())
