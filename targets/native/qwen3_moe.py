"""Qwen3-MoE: the MoE sibling of Qwen3; any layer may stay dense.

Router: softmax, top-k, weights divided by their sum if ``norm_topk_prob``. Attention: one sliding
window for all layers or none, where dense Qwen3 chooses per layer. Read in transformers 5.23
(``models/qwen3_moe``).
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.native import NativeTarget


def _fits(config: PreTrainedConfig) -> str | None:
    if len(set(config.layer_types)) > 1:
        return (
            "some layers attend through a sliding window and some do not, "
            "and Qwen3-MoE has one rule for all layers"
        )
    return None


def _attention(config: PreTrainedConfig) -> dict[str, Any]:
    sliding = "sliding_attention" in config.layer_types
    window = config.sliding_window if sliding else None
    return {"use_sliding_window": sliding, "sliding_window": window}


QWEN3_MOE = NativeTarget(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sources={"qwen3": "Qwen3ForCausalLM"},
    fits=_fits,
    weight_rules={
        "renormalised": {"norm_topk_prob": True},
        "softmax": {"norm_topk_prob": False},
    },
    field_num_experts="num_experts",
    field_top_k="num_experts_per_tok",
    field_width="moe_intermediate_size",
    field_dense_layers="mlp_only_layers",
    carried=("attention_bias", "intermediate_size"),
    checked=("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    ignored=(),
    constants={"decoder_sparse_step": 1, "output_router_logits": False},
    attention=_attention,
    router="model.layers.{layer}.mlp.gate.weight",
    expert="model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight",
    matrices=("gate_proj", "up_proj", "down_proj"),
    runtimes={
        "transformers": "yes",
        "vLLM": "native; without attention_bias",
        "SGLang": "native",
        "llama.cpp": "native; only with weights `renormalised` and no layer left dense",
    },
)
