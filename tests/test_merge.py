"""A split can be taken back: merging gives the dense model bit for bit."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import upcycle

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    return {
        "bert": BertModel(BertConfig(**TINY, intermediate_size=50)),
        "llama": Llama(LlamaConfig(**TINY, intermediate_size=80, num_key_value_heads=2)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, **ids)),
    }


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_merging_a_split_gives_the_dense_model_bit_for_bit(name: str) -> None:
    """50 neurons in 16 experts: the groups are ragged, so padding is dropped as well."""
    dense = models()[name].eval()
    conversion = upcycle.convert(dense, "split-all", verify=False)
    merged = conversion.to_dense()
    assert type(merged) is type(dense)
    assert merged.state_dict().keys() == dense.state_dict().keys()
    for key, tensor in dense.state_dict().items():
        assert torch.equal(merged.state_dict()[key], tensor), key


def test_merging_keeps_what_was_trained() -> None:
    dense = models()["llama"].eval()
    conversion = upcycle.convert(dense, "split-all", verify=False)
    with torch.no_grad():
        for parameter in conversion.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    tokens = torch.arange(14).reshape(2, 7)
    merged = conversion.to_dense()
    with torch.no_grad(), upcycle.all_experts(conversion.model):
        sparse = conversion.model(input_ids=tokens).logits
        whole = merged(input_ids=tokens).logits
        before = dense(input_ids=tokens).logits
    # sums of at most 80 products, in another order, through two layers
    bound = 2 * 80 * torch.finfo(torch.float32).eps * whole.abs().max()
    torch.testing.assert_close(sparse, whole, rtol=0, atol=bound.item())
    assert (whole - before).abs().max() > 100 * bound


def test_copies_cannot_be_merged() -> None:
    conversion = upcycle.convert(models()["bert"].eval(), "sparse-upcycling", verify=False)
    with pytest.raises(upcycle.UnsupportedError, match="copies"):
        conversion.to_dense()


@pytest.mark.parametrize("shared_by", ["norm", "first"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_merging_a_split_with_a_shared_expert(name: str, shared_by: str) -> None:
    """50 or more neurons in 7 experts, of which 2 are shared: ragged groups of the others."""
    dense = models()[name].eval()
    shared = ["experts.count=7", "experts.shared=2", f"experts.shared_by={shared_by}"]
    conversion = upcycle.convert(dense, "split-all", overrides=shared)
    assert all(len(p.shared_S) > 0 for p in conversion.provenance.values())
    merged = conversion.to_dense()
    for key, tensor in dense.state_dict().items():
        assert torch.equal(merged.state_dict()[key], tensor), key
    layers = [m for m in conversion.model.modules() if isinstance(m, upcycle.MoE)]
    with torch.no_grad():
        for layer in layers:
            assert layer.shared_expert is not None
            layer.shared_expert.down_proj.weight.mul_(2)  # trained: it goes where it came from
    again = conversion.to_dense().state_dict()
    changed = [
        key for key, tensor in dense.state_dict().items() if not torch.equal(again[key], tensor)
    ]
    downs = [spec.ffn.contraction.weight for spec in conversion.plan.specs]
    assert sorted(changed) == sorted(downs)


@pytest.mark.parametrize("recipe", ["drop-upcycling", "residual-moe"])
def test_changed_copies_and_zero_experts_cannot_be_merged(recipe: str) -> None:
    conversion = upcycle.convert(models()["bert"].eval(), recipe, verify=False)
    with pytest.raises(upcycle.UnsupportedError, match="only the experts of a split"):
        conversion.to_dense()
