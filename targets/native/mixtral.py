"""Mixtral: the MoE sibling of Llama and Mistral; every layer is sparse.

Router: softmax, top-k, weights divided by their sum. Attention: no biases, one sliding window for
all layers or none. Read in transformers 5.23 (``models/mixtral``).
"""

from upcycle.targets.native.architecture import (
    LLAMA,
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Stacks,
)
from upcycle.targets.native.attention import head_dim, split_qkv

MISTRAL = DenseArchitecture("MistralForCausalLM", carried=("sliding_window",))
PHI3 = DenseArchitecture(
    "Phi3ForCausalLM",
    absent=("resid_pdrop", "embd_pdrop"),
    carried=("sliding_window", "original_max_position_embeddings"),
    tensors=split_qkv,
    roles=("gate_up_proj", "gate_up_proj", "down_proj"),
    # Transformers computes the rotated part of a head from it, and Mixtral has no default.
    fields=lambda config: {"head_dim": head_dim(config)},
)

MIXTRAL = NativeTarget(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sources={"llama": LLAMA, "mistral": MISTRAL, "phi3": PHI3},
    forms=(RouterRule("softmax", renormalise=True),),
    num_experts="num_local_experts",
    width="intermediate_size",
    constants={"sliding_window": None, "output_router_logits": False},
    router="{layer}.block_sparse_moe.gate.weight",
    experts=Stacks("{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight", ("w1", "w3", "w2")),
)
