"""Llama 4 (text), for SmolLM3: the only MoE with its layers without positions.

Router: top-k, and a sigmoid multiplies the input of the expert, so that only experts which add
nothing yet (``zero_routed``) are exact. The shared expert is as wide as an expert. Any layer may
stay dense. RoPE turns neighbours, so queries and keys are permuted where there is RoPE. Read in
transformers 5.23 (``models/llama4``).
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from upcycle.targets.native.architecture import (
    DenseArchitecture,
    FusedTensors,
    NativeTarget,
    RouterRule,
    Shared,
    TensorRule,
    gate_up_down,
)
from upcycle.targets.native.attention import head_dim, interleaved_rope, no_windows, renamed


def _tensors(config: PreTrainedConfig) -> Sequence[TensorRule]:
    rotated = [i for i, has_rope in enumerate(config.no_rope_layers) if has_rope]
    return [*interleaved_rope(config, rotated), renamed("mlp", "feed_forward")]


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "head_dim": head_dim(config),
        "intermediate_size_mlp": config.intermediate_size,
        "attention_chunk_size": config.max_position_embeddings,  # no layer has it, yet it is read
        "layer_types": ["full_attention"] * config.num_hidden_layers,
    }


SMOLLM3 = DenseArchitecture(
    "SmolLM3ForCausalLM",
    absent=("mlp_bias",),
    fits=no_windows,
    carried=("attention_bias", "no_rope_layers", "no_rope_layer_interval"),
    checked=("layer_types", "sliding_window", "use_sliding_window"),
    fields=_fields,
    tensors=_tensors,
)

LLAMA4_TEXT = NativeTarget(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    sources={"smollm3": SMOLLM3},
    forms=(RouterRule("input", renormalise=False),),
    num_experts="num_local_experts",
    width="intermediate_size",
    dense=lambda sparse: {"moe_layers": [i for i, is_sparse in enumerate(sparse) if is_sparse]},
    constants=dict.fromkeys(
        ("attn_temperature_tuning", "output_router_logits", "use_qk_norm"), False
    ),
    grouped=False,
    router="{layer}.feed_forward.router.weight",
    experts=FusedTensors(
        "{layer}.feed_forward.experts.gate_up_proj",
        "{layer}.feed_forward.experts.down_proj",
        transposed=True,
    ),
    shared=Shared(gate_up_down("{layer}.feed_forward.shared_expert")),
)
