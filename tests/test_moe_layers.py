"""MoE layers of transformers' own architectures: found, and computed by `Experts`."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.errors import UnsupportedError
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.experts import Experts
from upcycle.models.moe_layers import as_experts, moe_layers, with_own_experts

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"vocab_size": 99, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "moe_num_experts": 4},
    **{"shared_expert_intermediate_size": 40, "q_lora_rank": 8, "kv_lora_rank": 8, "moe_k": 2},
    **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
}
# Architecture -> width of an expert, and of what every token visits.
FAMILIES = {
    "mixtral": (48, 0),
    "qwen2_moe": (24, 40),
    "qwen3_moe": (24, 0),
    "olmoe": (48, 0),
    "granitemoe": (48, 0),  # another name for the block
    "granitemoeshared": (48, 0),
    "glm4_moe": (24, 24),
    "deepseek_v2": (24, 48),
    "gpt_oss": (48, 0),  # rows of gate and up alternate, transposed, with biases and a clamp
    "phimoe": (48, 0),
    "hunyuan_v1_moe": (48, 48),
    "flex_olmo": (48, 0),
    "minimax": (48, 0),
}


def tiny(family: str) -> nn.Module:
    known = AutoConfig.for_model(family)
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1 or family == "gpt_oss":  # biases too
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_found_by_what_they_compute(family: str) -> None:
    model, ids = tiny(family), torch.arange(12)[None]
    found = moe_layers(model)
    assert [(row.num_experts, row.top_k, row.d_model, row.is_own) for row in found] == [
        (4, 2, 32, False)
    ] * 2
    assert {(row.width, row.shared) for row in found} == {FAMILIES[family]}
    before = [row.experts for row in found]
    with torch.no_grad():
        theirs = model(ids).logits
        with with_own_experts(model):
            assert all(isinstance(row.experts, Experts) for row in moe_layers(model))
            ours = model(ids).logits
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= ROUNDING[torch.float32]
    assert not torch.equal(theirs, torch.zeros_like(theirs))
    assert [row.experts for row in moe_layers(model)] == before  # as it was


def test_memory_is_shared_unless_rows_move() -> None:
    for family, is_shared in (("mixtral", True), ("gpt_oss", False)):
        experts = moe_layers(tiny(family))[0].experts
        ours = as_experts(experts, "mlp")
        assert (ours.up_EGD.data_ptr() == experts.gate_up_proj.data_ptr()) is is_shared


def test_a_dense_model_has_none() -> None:
    known = AutoConfig.for_model("llama")
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    assert moe_layers(model) == []


def test_what_is_no_ffn_is_refused() -> None:
    experts = moe_layers(tiny("mixtral"))[0].experts
    experts._apply_gate = lambda hidden: hidden.chunk(2, -1)[0].softmax(-1)
    with pytest.raises(UnsupportedError, match=r"mlp: what its experts .* compute is no FFN"):
        as_experts(experts, "mlp")
