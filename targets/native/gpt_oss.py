"""GPT-OSS, for Llama in transformers alone: every layer is sparse, and the router has a bias.

Router: top-k, then softmax over the chosen experts. An expert computes
``(up + 1) * gate * sigmoid(alpha * gate)`` with clamped inputs: with alpha 1, a bias of -1 for `up`
and a clamp out of reach that is SwiGLU. Other software has alpha 1.702. Attention sinks of -1e9
take no weight. Read in transformers 5.23 (``models/gpt_oss``).
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import LLAMA, FusedTensors, NativeTarget, RouterRule
from upcycle.targets.native.attention import head_dim, no_sinks


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "head_dim": head_dim(config),
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "sliding_window": config.max_position_embeddings,  # no layer has it, but it must be set
    }


LLAMA_WITH_SINKS = replace(
    LLAMA, absent=("mlp_bias",), carried=("attention_bias",), fields=_fields, tensors=no_sinks
)

GPT_OSS = NativeTarget(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    sources={"llama": LLAMA_WITH_SINKS},
    forms=(RouterRule("softmax", renormalise=True, by_logits=True),),
    num_experts="num_local_experts",
    width="intermediate_size",
    constants={"output_router_logits": False, "swiglu_alpha": 1.0, "swiglu_limit": 1e30},
    router="{layer}.mlp.router.weight",
    router_bias="{layer}.mlp.router.bias",
    experts=FusedTensors(
        "{layer}.mlp.experts.gate_up_proj",
        "{layer}.mlp.experts.down_proj",
        transposed=True,
        interleaved=True,
        biases=("{layer}.mlp.experts.gate_up_proj_bias", "{layer}.mlp.experts.down_proj_bias"),
        up_bias=-1.0,
    ),
)
