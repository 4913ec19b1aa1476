"""Native mixtures of experts of transformers, small and with random weights."""

from typing import Any

import torch
import transformers

# Names that several families use; each configuration takes those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FAMILIES = (
    "Mixtral",
    "Qwen2Moe",
    "Qwen3Moe",
    "Olmoe",
    "GraniteMoe",
    "GptOss",
    "Glm4Moe",
    "Ernie4_5_Moe",
    "HunYuanMoEV1",
    "MiniMax",
    "FlexOlmo",
    "Cohere2Moe",
)


def native(family: str, seed: int = 0, **changes: Any) -> Any:
    """A decoder of the family, whose experts differ and whose routers are not sure."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**_SIZES)
    for name, value in {**_SIZES, **changes}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    names = [n for n in dir(transformers) if n.startswith(family) and n.endswith("ForCausalLM")]
    model = getattr(transformers, names[0])._from_config(config)
    for parameter in model.parameters():  # the usual 0.02 would make every layer an identity
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return model.eval()
