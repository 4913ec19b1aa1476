"""Qwen2-MoE: the MoE sibling of Qwen2; any layer may stay dense.

Router: softmax, top-k, weights divided by their sum if ``norm_topk_prob``. A shared expert, times
the sigmoid of a gate; software other than transformers wants one, so a layer without gets one of
zeros. Attention: biases for queries, keys and values, which vLLM reads always; a sliding window per
layer. llama.cpp does not divide the weights, and wants an output matrix that is not tied. Read in
transformers 5.23 (``models/qwen2_moe``).
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Shared,
    dense_list,
)
from upcycle.targets.native.attention import zero_biases

INERT = 32  # neurons of a shared expert that adds nothing: a multiple that quantised types want


def _windows(config: PreTrainedConfig) -> dict[str, Any]:
    sliding = "sliding_attention" in config.layer_types
    return {"use_sliding_window": sliding, "sliding_window": config.sliding_window or 0}


def _no_windows(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": False,
        "sliding_window": 0,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
    }


QWEN2 = DenseArchitecture(
    "Qwen2ForCausalLM",
    carried=("intermediate_size", "layer_types", "max_window_layers"),
    checked=("sliding_window", "use_sliding_window"),
    fields=_windows,
)
SEED_OSS = DenseArchitecture(
    "SeedOssForCausalLM",
    absent=("attention_out_bias", "mlp_bias"),
    fits=lambda config: None if config.attention_bias else "attention_bias is false",
    carried=("intermediate_size",),
    checked=("attention_bias",),
    ignored=("pretraining_tp", "residual_dropout"),
    fields=_no_windows,
)
LLAMA = DenseArchitecture(
    "LlamaForCausalLM",
    absent=("attention_bias", "mlp_bias"),
    carried=("intermediate_size",),
    ignored=("pretraining_tp",),
    fields=_no_windows,
    tensors=zero_biases,
)

QWEN2_MOE = NativeTarget(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sources={"qwen2": QWEN2, "seed_oss": SEED_OSS, "llama": LLAMA},
    forms=(
        RouterRule("softmax", renormalise=True, config={"norm_topk_prob": True}),
        RouterRule("softmax", renormalise=False, config={"norm_topk_prob": False}),
    ),
    dense=dense_list("mlp_only_layers"),
    constants={"decoder_sparse_step": 1, "output_router_logits": False, "qkv_bias": True},
    shared=Shared(
        tuple(f"{{layer}}.mlp.shared_expert.{w}_proj.weight" for w in ("gate", "up", "down")),
        width="shared_expert_intermediate_size",
        least=INERT,
        gate="{layer}.mlp.shared_expert_gate.weight",
    ),
    may_untie=True,
)
