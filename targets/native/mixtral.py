"""Mixtral: the MoE sibling of Llama and Mistral; every layer is sparse.

Router: softmax, top-k, weights divided by their sum. Attention: no biases, one sliding window for
all layers or none. Read in transformers 5.23 (``models/mixtral``).
"""

from transformers import PreTrainedConfig

from upcycle.targets.native.native import NativeTarget


def _fits(config: PreTrainedConfig) -> str | None:
    if getattr(config, "attention_bias", False):
        return "attention_bias is true, and the attention of Mixtral has no biases"
    if getattr(config, "mlp_bias", False):
        return "mlp_bias is true, and the experts of Mixtral have no biases"
    return None


MIXTRAL = NativeTarget(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sources={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    fits=_fits,
    weight_rules={"renormalised": {}},
    field_num_experts="num_local_experts",
    field_top_k="num_experts_per_tok",
    field_width="intermediate_size",
    field_dense_layers=None,
    carried=("sliding_window",),
    checked=("attention_bias", "mlp_bias"),
    ignored=("pretraining_tp",),
    constants={"sliding_window": None, "output_router_logits": False},
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight",
    matrices=("w1", "w3", "w2"),
    runtimes={
        "transformers": "yes",
        "vLLM": "native",
        "SGLang": "native",
        "llama.cpp": "native; ignores the sliding window",
    },
)
