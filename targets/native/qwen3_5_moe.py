"""Qwen3.5-MoE (text): the MoE sibling of Qwen3.5, with its linear and gated attention.

Router: softmax, top-k, weights divided by their sum. A shared expert, times the sigmoid of a gate.
Every layer is sparse. Read in transformers 5.23 (``models/qwen3_5_moe``).
"""

from upcycle.targets.native.architecture import (
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Shared,
    all_sparse,
)
from upcycle.targets.native.qwen2_moe import INERT

QWEN3_5 = DenseArchitecture(
    "Qwen3_5ForCausalLM",
    carried=(
        "attention_bias",
        "layer_types",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
    ),
    partial_rope=True,
)

QWEN3_5_MOE = NativeTarget(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sources={"qwen3_5_text": QWEN3_5},
    forms=(RouterRule("softmax", renormalise=True),),
    dense=all_sparse,
    constants={"output_router_logits": False},
    shared=Shared(
        tuple(f"{{layer}}.mlp.shared_expert.{w}_proj.weight" for w in ("gate", "up", "down")),
        width="shared_expert_intermediate_size",
        least=INERT,
        gate="{layer}.mlp.shared_expert_gate.weight",
    ),
)
