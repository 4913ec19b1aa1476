"""The MoE siblings of Qwen2, Qwen3 and Qwen3.5 (text).

Router: softmax, top-k, weights divided by their sum (in Qwen2 and Qwen3 if ``norm_topk_prob``). Any
layer may stay dense (not in Qwen3.5). Read in transformers 5.23 (``models/qwen2_moe``,
``qwen3_moe``, ``qwen3_5_moe``).

Qwen2 and Qwen3.5 have a shared expert, times the sigmoid of a gate; software other than
transformers wants one, so a layer without gets one of zeros. Attention of Qwen2: biases for
queries, keys and values, which vLLM reads always; a sliding window per layer. llama.cpp does not
divide the weights of Qwen2, and wants an output matrix that is not tied. Attention of Qwen3: one
sliding window for all layers or none, where dense Qwen3 chooses per layer. Attention of Qwen3.5:
linear and gated, as in the dense model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    LLAMA,
    NORM_TOPK_PROB,
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Shared,
    gate_up_down,
)
from upcycle.targets.native.attention import one_window, zero_biases


def _windows(config: PreTrainedConfig) -> dict[str, Any]:
    sliding = "sliding_attention" in config.layer_types
    return {"use_sliding_window": sliding, "sliding_window": config.sliding_window or 0}


def _no_windows(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": False,
        "sliding_window": 0,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
    }


def _one_window(config: PreTrainedConfig) -> dict[str, Any]:
    sliding = "sliding_attention" in config.layer_types
    window = config.sliding_window if sliding else None
    return {"use_sliding_window": sliding, "sliding_window": window}


def _dense(sparse: Sequence[bool]) -> dict[str, Any]:
    return {"mlp_only_layers": [i for i, is_sparse in enumerate(sparse) if not is_sparse]}


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
LLAMA_WITH_BIASES = replace(
    LLAMA, carried=("intermediate_size",), fields=_no_windows, tensors=zero_biases
)
QWEN3 = DenseArchitecture(
    "Qwen3ForCausalLM",
    fits=one_window,
    carried=("attention_bias", "intermediate_size"),
    checked=("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    fields=_one_window,
)
QWEN3_5 = DenseArchitecture(
    "Qwen3_5ForCausalLM",
    carried=(
        *("attention_bias", "layer_types", "linear_conv_kernel_dim", "linear_key_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim"),
    ),
    partial_rope=True,
)
SHARED = Shared(
    gate_up_down("{layer}.mlp.shared_expert"),
    width="shared_expert_intermediate_size",
    least=32,  # a multiple that quantised types want
    gate="{layer}.mlp.shared_expert_gate.weight",
)

QWEN2_MOE = NativeTarget(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sources={"qwen2": QWEN2, "seed_oss": SEED_OSS, "llama": LLAMA_WITH_BIASES},
    forms=NORM_TOPK_PROB,
    dense=_dense,
    constants={"decoder_sparse_step": 1, "output_router_logits": False, "qkv_bias": True},
    shared=SHARED,
    may_untie=True,
)
QWEN3_MOE = NativeTarget(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sources={"qwen3": QWEN3},
    forms=NORM_TOPK_PROB,
    dense=_dense,
    constants={"decoder_sparse_step": 1, "output_router_logits": False},
)
QWEN3_5_MOE = NativeTarget(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sources={"qwen3_5_text": QWEN3_5},
    forms=(RouterRule("softmax", renormalise=True),),
    constants={"output_router_logits": False},
    shared=SHARED,
)
