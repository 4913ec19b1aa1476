"""Every pair of a dense and a native MoE architecture that holds it exactly.

Written as files, read by transformers alone, and compared with the dense model (copies and splits)
or, with experts and a router drawn at random, with a reference in float64 that shares no code with
upcycle.
"""

from pathlib import Path
from typing import Any

import native_models
import pytest
import torch
from native_case import (
    COPIES,
    SHARED,
    SLICES,
    ZEROS,
    logits,
    plan_of,
    reference,
    relative,
    target_of,
    write,
)
from torch import nn

from upcycle.targets.native import NATIVE
from upcycle.targets.native.choose import choose

# On the way to a logit each of 3 layers sums 32 products four times for attention, 32 for gate and
# up and 48 for down, and the head 32: 656 roundings. As a random walk they are off by 26 eps, and
# three times that is 9e-6.
BOUND = 1e-5
# In float32 the recurrence of linear attention is off by 1.6e-5 in the dense model already, and two
# models may err in opposite directions.
BOUNDS = {"qwen3_5": 4e-5}

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "A": (COPIES, {"top_k": 2, "weights": "renormalised"}),
    "B": (COPIES, {"top_k": 2, "weights": "renormalised"}),  # on a router that does not divide
    "C": (SLICES, {"top_k": "all", "weights": "one"}),
    "D": (SHARED, {"top_k": "all", "weights": "one"}),
    "E": (ZEROS, {"top_k": 2, "weights": "renormalised"}),
}
PAIRS = [
    *(("llama", "mixtral", kind) for kind in "AC"),
    ("llama-tied", "mixtral", "A"),
    *(("llama", "granitemoe", kind) for kind in "AC"),
    *(("llama", "granitemoeshared", kind) for kind in "ADE"),
    *(("llama", "qwen2_moe", kind) for kind in "ABCDE"),
    *(("llama", "ernie4_5_moe", kind) for kind in "ACDE"),
    *(("llama", "glm4_moe", kind) for kind in "ACDE"),
    *(("llama", "solar_open", kind) for kind in "ACD"),
    *(("llama", "gpt_oss", kind) for kind in "AC"),
    *(("llama-bias", "granitemoeshared", kind) for kind in "ACD"),
    *(("mistral", "mixtral", kind) for kind in "AC"),
    *(("phi3", "mixtral", kind) for kind in "AC"),
    *(("qwen2", "qwen2_moe", kind) for kind in "ABCDE"),
    *(("qwen2-sliding", "qwen2_moe", kind) for kind in "AC"),
    *(("qwen2", "glm4_moe", kind) for kind in "ACD"),
    *(("seed_oss", "qwen2_moe", kind) for kind in "ACD"),
    ("seed_oss", "glm4_moe", "D"),
    *(("qwen3", "qwen3_moe", kind) for kind in "ABC"),
    *(("qwen3", "glm4_moe", kind) for kind in "AD"),
    *(("qwen3-sliding", "dots1", kind) for kind in "ACD"),
    *(("qwen3_5", "qwen3_5_moe_text", kind) for kind in "ACDE"),
    *(("olmo2", "flex_olmo", kind) for kind in "ABC"),
    *(("granite", "granitemoe", kind) for kind in "AC"),
    ("granite", "granitemoeshared", "D"),
    *(("granite_swa", "granitemoe_swa", kind) for kind in "ACD"),
    *(("ernie4_5", "ernie4_5_moe", kind) for kind in "AD"),
    *(("cohere2", "cohere2_moe", kind) for kind in "AD"),
    ("hunyuan", "hunyuan_v1_moe", "E"),
    ("gemma", "granitemoe", "A"),
    ("smollm3", "llama4_text", "E"),
    *(("t5", "switch_transformers", kind) for kind in "AB"),
]


def generated(model: nn.Module, name: str) -> torch.Tensor:
    prompt = native_models.inputs(name, 8)["input_ids"]
    return model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # no shared expert
@pytest.mark.parametrize(("name", "target", "kind"), PAIRS, ids=lambda value: value)
def test_the_written_model_is_the_dense_model(
    name: str, target: str, kind: str, tmp_path: Path
) -> None:
    plan = plan_of(name, *KINDS[kind], target)
    fields: dict[str, Any] = {}
    if kind == "B" and target == "switch_transformers":
        plan = plan_of(name, COPIES, KINDS[kind][1] | {"method": "zero"}, target)
    elif kind == "B":
        fields = {"norm_topk_prob": False}
    elif kind in "CD" and target in ("glm4_moe", "dots1", "solar_open"):
        fields = {"norm_topk_prob": False, "routed_scaling_factor": 2.0}
    moe = write(tmp_path, name, plan, target_of(name, plan, **fields))
    dense = native_models.dense_model(name)
    assert relative(logits(moe, name), logits(dense, name)) < BOUNDS.get(name, BOUND)
    assert torch.equal(generated(moe, name), generated(dense, name))


# What each router does by itself: k of 4 experts, and biases where it has them.
ROUTER_KINDS: dict[str, dict[str, Any]] = {
    "renormalised": {"top_k": 2, "weights": "renormalised"},
    "scaled": {"top_k": 3, "weights": "renormalised", "scale": 1.7},
    "softmax": {"top_k": 2, "weights": "softmax"},
    "best": {"top_k": 1, "weights": "one"},
    "probable": {"top_k": 1, "weights": "softmax"},
    "every": {"top_k": "all", "weights": "one"},
    "bias": {"top_k": 2, "weights": "renormalised", "bias": True},
    "balance": {"top_k": 2, "weights": "renormalised", "balance": True},
    "detached": {"top_k": 2, "weights": "renorm_detach"},
    "gains": {"top_k": "all", "weights": "gain"},  # of zero
}
DISTINCT = [
    *(("llama", "mixtral", router, 0) for router in ("renormalised", "scaled", "best", "every")),
    ("mistral", "mixtral", "renormalised", 0),
    ("phi3", "mixtral", "renormalised", 0),
    ("llama", "granitemoe", "renormalised", 0),
    ("llama-bias", "granitemoeshared", "renormalised", 1),
    *(("llama", "qwen2_moe", router, 1) for router in ("renormalised", "softmax", "every")),
    *(("qwen2", "qwen2_moe", router, 0) for router in ("renormalised", "softmax", "scaled")),
    ("seed_oss", "qwen2_moe", "renormalised", 1),
    *(("qwen3", "qwen3_moe", router, 0) for router in ("renormalised", "softmax", "every")),
    ("qwen3_5", "qwen3_5_moe_text", "renormalised", 1),
    ("qwen3_5", "qwen3_5_moe_text", "renormalised", 0),
    *(("llama", "ernie4_5_moe", router, 1) for router in ("renormalised", "balance")),
    ("ernie4_5", "ernie4_5_moe", "renormalised", 0),
    *(("llama", "glm4_moe", router, 1) for router in ("best", "every")),
    ("qwen3", "glm4_moe", "every", 1),
    ("qwen3-sliding", "dots1", "every", 1),
    ("llama", "solar_open", "best", 0),
    *(("olmo2", "flex_olmo", router, 0) for router in ("renormalised", "softmax")),
    ("granite", "granitemoeshared", "renormalised", 1),
    ("granite_swa", "granitemoe_swa", "renormalised", 1),
    *(("cohere2", "cohere2_moe", "renormalised", shared) for shared in (0, 1)),
    ("hunyuan", "hunyuan_v1_moe", "renormalised", 1),
    ("gemma", "granitemoe", "renormalised", 0),
    *(("t5", "switch_transformers", router, 0) for router in ("probable", "best")),
    *(("llama", "mixtral", router, 0) for router in ("detached", "gains")),
    ("llama", "glm4_moe", "gains", 1),
    *(("llama", "gpt_oss", router, 0) for router in ("renormalised", "bias")),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "target", "router", "shared"), DISTINCT)
def test_distinct_experts_are_the_reference(
    name: str, target: str, router: str, shared: int, tmp_path: Path
) -> None:
    experts = {**SLICES, "shared": shared}
    plan = plan_of(name, experts, ROUTER_KINDS[router], target)
    moe = write(tmp_path, name, plan, target_of(name, plan), random=True)
    expected = logits(reference(name, plan), name)
    assert relative(logits(moe, name), expected) < BOUNDS.get(name, BOUND)
    assert relative(logits(native_models.dense_model(name), name), expected) > 1e-2


def test_a_switch_sends_a_token_to_one_expert() -> None:
    """A split of which a token visits all experts is no Switch, though the weights would fit."""
    plan = plan_of("t5", SLICES, ROUTER_KINDS["every"], "switch_transformers")
    config = native_models.dense_model("t5").config
    target, reasons = choose(NATIVE, config, plan, only="switch_transformers")
    assert target is None
    assert "its tokens visit 1 expert each" in reasons["switch_transformers"]
