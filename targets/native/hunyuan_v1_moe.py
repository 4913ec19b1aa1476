"""HunYuan-MoE v1: the MoE sibling of HunYuan v1; every layer is sparse.

Router: softmax, top-k, weights divided by their sum. The shared expert is always there, as wide as
an expert. Norms of queries and keys come after RoPE, as in the dense model and in no other
architecture. Read in transformers 5.23 (``models/hunyuan_v1_moe``).
"""

from upcycle.targets.native.architecture import (
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Shared,
    gate_up_down,
)

HUNYUAN = DenseArchitecture(
    "HunYuanDenseV1ForCausalLM",
    carried=("attention_bias", "eod_token_id"),
    ignored=("pretraining_tp",),
)

HUNYUAN_V1_MOE = NativeTarget(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    sources={"hunyuan_v1_dense": HUNYUAN},
    forms=(RouterRule("softmax", renormalise=True),),
    top_k="moe_topk",
    width="intermediate_size",
    constants={"output_router_logits": False},
    router="{layer}.mlp.gate.wg.weight",
    shared=Shared(gate_up_down("{layer}.mlp.shared_mlp")),
)
