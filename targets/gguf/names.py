"""Where a tensor of a model is in a GGUF file, and how it is cut and turned on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES, get_tensor_name_map

from upcycle.errors import UnsupportedError
from upcycle.targets.gguf.architectures import GgufArchitecture

GATE_UP = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP)
# What the package gguf does not know under the names that tensors have in transformers 5.
PARTS = {
    "mlp.experts.gate_up_proj": GATE_UP,
    "mlp.experts.down_proj": (MODEL_TENSOR.FFN_DOWN_EXP,),
    "block_sparse_moe.experts.gate_up_proj": GATE_UP,
    "block_sparse_moe.experts.down_proj": (MODEL_TENSOR.FFN_DOWN_EXP,),
    "block_sparse_moe.router.weight": (MODEL_TENSOR.FFN_GATE_INP,),
    "shared_mlp.input_linear.weight": (MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_UP_SHEXP),
    "mlp.gate.e_score_correction_bias": (MODEL_TENSOR.FFN_EXP_PROBS_B,),
    "mlp.gate.moe_statics.e_score_correction_bias": (MODEL_TENSOR.FFN_EXP_PROBS_B,),
}
OUTPUT, EMBEDDINGS = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Place:
    """Where one tensor of the model goes.

    Attributes:
        names: in the file; several are equal parts along the axis before the last.
        heads: heads whose rows change places, from halves to neighbours; 0 if they stay.
    """

    names: tuple[str, ...]
    heads: int = 0

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of the file; axes of length one in front are dropped."""
        if self.heads:
            rows = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        if tensor.dim() == 2 and tensor.shape[0] == 1:
            tensor = tensor[0]
        return tensor.chunk(len(self.names), dim=-2) if len(self.names) > 1 else (tensor,)

    def join(self, parts: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """The tensor of the model, of `shape`, from those of the file."""
        tensor = torch.cat(list(parts), dim=-2) if len(parts) > 1 else parts[0]
        if self.heads:
            rows = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        return tensor.reshape(shape)


def places(
    tensors: Mapping[str, torch.Tensor], entry: GgufArchitecture, config: Any
) -> dict[str, Place]:
    """The place of every tensor of a model, by its name there.

    Raises:
        UnsupportedError: the architecture of llama.cpp has no place for one.
    """
    layers = config.num_hidden_layers
    _check_layers(tensors, entry, layers)
    named = get_tensor_name_map(entry.arch, layers)
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }
    found = {}
    for name in tensors:
        layer, rest = _in_layer(name)
        parts = PARTS.get(rest)
        if parts is not None:
            suffix = "bias" if rest.endswith("bias") else "weight"
            found[name] = Place(
                tuple(f"{TENSOR_NAMES[p].format(bid=layer)}.{suffix}" for p in parts)
            )
            continue
        mapped = named.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None or (rest == "self_attn.o_proj.bias" and not entry.output_bias):
            raise UnsupportedError(f"gguf: the {entry.name} of llama.cpp has no place for {name}")
        turned = entry.turned and rest.startswith("self_attn.")
        kind = rest.split(".")[1] if turned else ""
        found[name] = Place((mapped,), heads.get(kind, 0))
    return found


def _in_layer(name: str) -> tuple[int, str]:
    """The number of the layer and the rest of a name; -1 outside the layers."""
    head, _, tail = name.partition(".layers.")
    number, _, rest = tail.partition(".")
    return (int(number), rest) if tail and number.isdigit() else (-1, head)


def _check_layers(tensors: Mapping[str, torch.Tensor], entry: GgufArchitecture, count: int) -> None:
    with_experts = {layer for layer, rest in map(_in_layer, tensors) if ".experts." in rest}
    dense = sorted(set(range(count)) - with_experts)
    if dense and not (entry.dense_lead and dense == [*range(len(dense))]):
        raise UnsupportedError(
            f"gguf: the {entry.name} of llama.cpp has experts in every layer"
            + (" after leading dense ones" if entry.dense_lead else "")
            + f", and layer {dense[-1]} is dense"
        )
