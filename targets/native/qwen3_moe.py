"""Qwen3-MoE: the MoE sibling of Qwen3; any layer may stay dense.

Router: softmax, top-k, weights divided by their sum if ``norm_topk_prob``. Attention: one sliding
window for all layers or none, where dense Qwen3 chooses per layer. Read in transformers 5.23
(``models/qwen3_moe``).
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    dense_list,
)
from upcycle.targets.native.attention import one_window


def _window(config: PreTrainedConfig) -> dict[str, Any]:
    sliding = "sliding_attention" in config.layer_types
    window = config.sliding_window if sliding else None
    return {"use_sliding_window": sliding, "sliding_window": window}


QWEN3 = DenseArchitecture(
    "Qwen3ForCausalLM",
    fits=one_window,
    carried=("attention_bias", "intermediate_size"),
    checked=("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    fields=_window,
)

QWEN3_MOE = NativeTarget(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sources={"qwen3": QWEN3},
    forms=(
        RouterRule("softmax", renormalise=True, config={"norm_topk_prob": True}),
        RouterRule("softmax", renormalise=False, config={"norm_topk_prob": False}),
    ),
    dense=dense_list("mlp_only_layers"),
    constants={"decoder_sparse_step": 1, "output_router_logits": False},
)
