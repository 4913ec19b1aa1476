"""A model that is converted in a tenth of a second."""

import torch
import transformers


def llama(vocab_size: int) -> transformers.LlamaForCausalLM:
    """Two layers of random weights; a table of its own for the output."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)
