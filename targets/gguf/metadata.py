"""What llama.cpp reads of a model beside its tensors: sizes, positions, experts."""

from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, RopeScalingType

from upcycle.errors import UnsupportedError
from upcycle.models.moe_layers import moe_layers
from upcycle.targets.gguf.architectures import GgufArchitecture


def add_metadata(
    writer: GGUFWriter, model: Any, entry: GgufArchitecture, name: str, file_type: LlamaFileType
) -> None:
    """Describe `model`.

    Raises:
        UnsupportedError: its layers have different numbers of experts, or visit different numbers.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_positions(writer, config, head_dim)
    _add_experts(writer, model)
    for method, value in entry.fields.items():
        value = getattr(config, value) if isinstance(value, str) else value
        getattr(writer, f"add_{method}")(value)


def context_length(config: Any) -> int:
    """Tokens up to which llama.cpp computes the same: it attends to everything, without windows."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and slides else longest


def rope_factors(config: Any) -> torch.Tensor | None:
    """By how much each frequency of Llama 3.1 is slowed, [head_dim / 2] in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled: torch.Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain: torch.Tensor = config.rope_parameters["rope_theta"] ** -exponents
    return (plain / scaled.double()).float()


def _add_positions(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _add_experts(writer: GGUFWriter, model: Any) -> None:
    found = {
        (layer.num_experts, layer.top_k, layer.width, layer.shared) for layer in moe_layers(model)
    }
    if len(found) != 1:
        raise UnsupportedError(
            "gguf: llama.cpp has the same number of experts, of the same width, in all layers"
        )
    ((count, top_k, width, shared),) = found
    writer.add_expert_count(count)
    writer.add_expert_used_count(top_k or count)
    writer.add_expert_feed_forward_length(width)
    if shared:
        writer.add_expert_shared_feed_forward_length(shared)
