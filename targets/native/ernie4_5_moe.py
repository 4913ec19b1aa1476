"""ERNIE 4.5 MoE: the MoE sibling of ERNIE 4.5; dense layers stand at the start or the end.

Router: softmax in float32, a bias for the choice alone, weights divided by their sum. Shared
experts are added as they are. RoPE turns neighbours, so queries and keys of Llama are permuted.
Read in transformers 5.23 (``models/ernie4_5_moe``).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from upcycle.targets.native.architecture import (
    LLAMA,
    DenseArchitecture,
    NativeTarget,
    RouterRule,
    Shared,
    gate_up_down,
)
from upcycle.targets.native.attention import interleaved_rope


def _dense(sparse: Sequence[bool]) -> dict[str, Any] | str:
    first, last = sparse.index(True), len(sparse) - 1 - sparse[::-1].index(True)
    if not all(sparse[first : last + 1]):
        late = sparse.index(False, first)
        return f"its sparse layers follow each other, and the plan leaves layer {late} dense"
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}


ERNIE4_5 = DenseArchitecture(
    "Ernie4_5ForCausalLM", absent=("use_bias",), carried=("intermediate_size",)
)
INTERLEAVED_LLAMA = replace(
    LLAMA,
    absent=(*LLAMA.absent, "attention_dropout"),
    carried=("intermediate_size",),
    tensors=interleaved_rope,
)

ERNIE4_5_MOE = NativeTarget(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    sources={"ernie4_5": ERNIE4_5, "llama": INTERLEAVED_LLAMA},
    forms=(RouterRule("softmax", renormalise=True),),
    num_experts="moe_num_experts",
    top_k="moe_k",
    dense=_dense,
    constants={"output_router_logits": False, "use_bias": False, "moe_norm_min": 1e-12},
    router_dtype=torch.float32,
    selection_bias="{layer}.mlp.moe_statics.e_score_correction_bias",
    selection_bias_shape="1E",
    shared=Shared(gate_up_down("{layer}.mlp.shared_experts"), count="moe_num_shared_experts"),
)
