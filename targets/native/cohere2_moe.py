"""Cohere2-MoE: the MoE sibling of Cohere2; any layer may stay dense.

Router: top-k, then softmax over the chosen experts. Shared experts are added as they are with the
strategy ``sum``; the default would average. Read in transformers 5.23 (``models/cohere2_moe``).
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    COMMON_FIELDS,
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Shared,
    gate_up_down,
)
from upcycle.targets.native.attention import head_dim


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "head_dim": head_dim(config),
        "prefix_dense_intermediate_size": config.intermediate_size,
        # With 1 a dense layer would rotate positions even where it attends to everything.
        "prefix_dense_sliding_window_pattern": 0,
        "rms_norm_eps": None,
    }


COHERE2 = DenseArchitecture(
    "Cohere2ForCausalLM",
    common=tuple(name for name in COMMON_FIELDS if name != "rms_norm_eps"),
    carried=("attention_bias", "layer_norm_eps", "layer_types", "logit_scale", "sliding_window"),
    fields=_fields,
)

COHERE2_MOE = NativeTarget(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    sources={"cohere2": COHERE2},
    forms=(
        RouterRule(
            "softmax", renormalise=True, config={"expert_selection_fn": "softmax"}, by_logits=True
        ),
    ),
    width="intermediate_size",
    dense=lambda sparse: {"mlp_layer_types": ["sparse" if s else "dense" for s in sparse]},
    constants={"output_router_logits": False, "shared_expert_combination_strategy": "sum"},
    shared=Shared(gate_up_down("{layer}.mlp.shared_experts"), count="num_shared_experts"),
)
