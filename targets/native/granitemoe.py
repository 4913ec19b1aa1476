"""The MoE siblings of Granite: granitemoe, granitemoeshared and granitemoe_swa; all layers sparse.

Router: top-k, then softmax over the chosen experts. A shared expert is added as it is. Factors on
embeddings, attention scores, residual branches and logits let them hold Llama and Gemma, too. Read
in transformers 5.23 (``models/granitemoe``, ``granitemoeshared``, ``granitemoe_swa``).
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    LLAMA,
    DenseArchitecture,
    FusedTensors,
    NativeTarget,
    RouterRule,
    Shared,
)
from upcycle.targets.native.attention import head_dim, one_more

FACTORS = (
    *("attention_bias", "attention_multiplier", "embedding_multiplier"),
    *("logits_scaling", "residual_multiplier"),
)


def _factors(config: PreTrainedConfig, embedding: float = 1.0) -> dict[str, Any]:
    return {
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": embedding,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }


GRANITE = DenseArchitecture("GraniteForCausalLM", absent=("mlp_bias",), carried=FACTORS)
LLAMA_WITH_FACTORS = replace(
    LLAMA, absent=("mlp_bias",), carried=("attention_bias",), fields=_factors
)
GEMMA = DenseArchitecture(  # only transformers reads the activation of experts
    "GemmaForCausalLM",
    absent=("use_bidirectional_attention",),
    carried=("attention_bias",),
    fields=lambda config: _factors(config, config.hidden_size**0.5),
    tensors=one_more,
    activation="gelu_pytorch_tanh",
)
GRANITE_SWA = DenseArchitecture(
    "GraniteSWAForCausalLM",
    absent=("mlp_bias",),
    carried=(*FACTORS, "layer_rope_theta", "layer_types", "sliding_window"),
)

GRANITEMOE = NativeTarget(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    sources={"granite": GRANITE, "llama": LLAMA_WITH_FACTORS, "gemma": GEMMA},
    forms=(RouterRule("softmax", renormalise=True, by_logits=True),),
    num_experts="num_local_experts",
    width="intermediate_size",
    constants={"output_router_logits": False},
    router="{layer}.block_sparse_moe.router.layer.weight",
    experts=FusedTensors(
        "{layer}.block_sparse_moe.input_linear.weight",
        "{layer}.block_sparse_moe.output_linear.weight",
    ),
)
GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    shared=Shared(
        ("{layer}.shared_mlp.input_linear.weight", "{layer}.shared_mlp.output_linear.weight"),
        width="shared_intermediate_size",
    ),
)
GRANITEMOE_SWA = replace(
    GRANITEMOESHARED,
    model_type="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    sources={"granite_swa": GRANITE_SWA},
    router="{layer}.block_sparse_moe.router.weight",
    experts=FusedTensors(
        "{layer}.block_sparse_moe.experts.gate_up_proj",
        "{layer}.block_sparse_moe.experts.down_proj",
    ),
)
