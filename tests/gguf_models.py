"""Small random MoE models of transformers and tokenizers for them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = 640
BASE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5, **GROUPS}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 24, "tie_word_embeddings": True},
    },
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"norm_topk_prob": True, "head_dim": 16},
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "granitemoe": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
        **{"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
        **{"attention_multiplier": 0.25, "tie_word_embeddings": True},
    },
    "granitemoeshared": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    },
    "dots1": {
        **ROUTED,
        **{"num_key_value_heads": 4, "first_k_dense_replace": 1, "norm_topk_prob": True},
    },
    "glm4_moe": {
        **ROUTED,
        **{"first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True, "head_dim": 16},
    },
    "solar_open": {**ROUTED, "head_dim": 16},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "pad_token_id": 2},
        **{"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "pad_token_id": 2},
}
TEXT = (
    "\n \n\n \t\t \t\n  \n   \n\U0001f680 (normal) 3 33 333 3333 33333 3.3 3..3 3...3 \u6211\u60f3"
    "\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = CONTRACTION + "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def split_by(digits: str) -> Any:
    pattern = Regex(LETTERS + digits + REST)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), BYTES])


# How a text is cut into words, and whether a word that is a token is taken whole, by llama.cpp's
# name for it.
CUTS = {
    "gpt-2": (GPT2, False),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
        False,
    ),
    "qwen2": (split_by("\\p{N}"), False),
    "llama-bpe": (split_by("\\p{N}{1,3}"), True),
    "dbrx": (split_by("\\p{N}{1,3}"), False),
}


def byte_tokenizer(cut: Any = GPT2, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Trained without cuts, so that its tokens reach over words and every cut shows."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = BYTES
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 20,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    made.pre_tokenizer = cut
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", bos_token="<|start|>"
    )
    fast.add_tokens(["<tool>"])  # looked for in every text, and no control token
    return fast


def piece_tokenizer(*, wrong: bool = False) -> PreTrainedTokenizerFast:
    """In the form in which transformers has the tokenizers of Llama 2 and Mixtral."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made = ["th", "he", "the", "\u2581the", "\u2581t", "in", "ing", "ng", "er", "\u2581a", "an"]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyzTC"]
    known = {*letters, *made}
    order = ["th", "he", "the", "\u2581t", "\u2581the", "in", "ng", "ing", "er", "\u2581a", "an"]
    merges = [
        (word[:i], word[i:])
        for word in order
        for i in range(1, len(word))
        if word[:i] in known and word[i:] in known
    ]
    if wrong:
        merges.append(merges.pop(2))  # a way to make a token, far from the other one
    index = {word: i for i, word in enumerate([*words, *letters, *order])}
    fast = Tokenizer(
        models.BPE(index, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def moe(kind: str, **changes: Any) -> Any:
    """A model with weights that matter: norms are not one, and biases of routers not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**BASE, **MODELS[kind], **changes})
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.normal_(0, 0.2)
            else:
                tensor.add_(0.1 * torch.randn_like(tensor))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return model.eval()


def saved(kind: str, folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """The directory of a model with a tokenizer."""
    moe(kind, **changes).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
