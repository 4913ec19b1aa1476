"""GLM-4-MoE and its relatives dots1 and Solar Open: sigmoid routers with a bias for the choice.

Router: sigmoid in float32, a bias for the choice alone, weights divided by their sum if
``norm_topk_prob``, times ``routed_scaling_factor``. Shared experts are added as they are. The first
layers may stay dense (not in Solar Open). They differ in attention: biases of queries, keys and
values and norms of queries and keys by flags (GLM), norms and sliding windows (dots1), neither
(Solar). None has a load-balancing loss. Read in transformers 5.23 (``models/glm4_moe``, ``dots1``,
``solar_open``).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    LLAMA,
    NORM_TOPK_PROB,
    DenseArchitecture,
    NativeTarget,
    Shared,
    all_sparse,
    gate_up_down,
)
from upcycle.targets.native.attention import head_dim, no_windows


def _attention(
    *, bias: bool = False, norm: bool = False
) -> Callable[[PreTrainedConfig], dict[str, Any]]:
    return lambda config: {
        "attention_bias": bias,
        "use_qk_norm": norm,
        "head_dim": head_dim(config),
    }


def _dense(sparse: Sequence[bool]) -> dict[str, Any] | str:
    first = sparse.index(True)
    if all(sparse[first:]):
        return {"first_k_dense_replace": first}
    late = sparse.index(False, first)
    return f"its dense layers come first, and the plan leaves layer {late} dense"


WINDOWS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")

PLAIN_LLAMA = replace(LLAMA, carried=("intermediate_size",), fields=_attention())
QWEN2 = DenseArchitecture(
    "Qwen2ForCausalLM",
    fits=no_windows,
    carried=("intermediate_size",),
    checked=WINDOWS,
    fields=_attention(bias=True),
)
SEED_OSS = DenseArchitecture(
    "SeedOssForCausalLM",
    absent=("attention_out_bias", "mlp_bias"),
    carried=("intermediate_size", "attention_bias"),
    ignored=("pretraining_tp", "residual_dropout"),
    fields=lambda config: {"use_qk_norm": False},
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    absent=("attention_bias",),
    fields=_attention(norm=True),
)
QWEN3_WINDOWS = replace(
    QWEN3,
    absent=(),
    fits=lambda config: None,
    carried=("intermediate_size", "attention_bias", "layer_types", "max_window_layers"),
    checked=("sliding_window", "use_sliding_window"),
    fields=lambda config: {"sliding_window": config.sliding_window, "head_dim": head_dim(config)},
)

FORMS = tuple(  # first without a division: where all experts are visited each weight is 2 * 0.5
    replace(rule, score="sigmoid", factor="routed_scaling_factor")
    for rule in reversed(NORM_TOPK_PROB)
)

ONE_GROUP = {"n_group": 1, "topk_group": 1, "output_router_logits": False}

GLM4_MOE = NativeTarget(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    sources={"llama": PLAIN_LLAMA, "qwen2": QWEN2, "seed_oss": SEED_OSS, "qwen3": QWEN3},
    forms=FORMS,
    num_experts="n_routed_experts",
    dense=_dense,
    constants={**ONE_GROUP, "num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0},
    selection_bias="{layer}.mlp.gate.e_score_correction_bias",
    shared=Shared(
        gate_up_down("{layer}.mlp.shared_experts"), count="n_shared_experts", always=True
    ),
    fewest=2,
)
DOTS1 = replace(
    GLM4_MOE,
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    sources={"qwen3": QWEN3_WINDOWS},
    constants={**ONE_GROUP, "scoring_func": "sigmoid"},
)
SOLAR_OPEN = replace(
    GLM4_MOE,
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    sources={"llama": PLAIN_LLAMA},
    dense=all_sparse,
    constants=ONE_GROUP,
)
