"""A language model whose blocks have one projection for attention and MLP, as files of its own.

It imports nothing of the tests: `save_pretrained` copies it beside the weights.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PalmConfig(PretrainedConfig):
    """Sizes; `joined` maps attention and MLP to the output with one matrix."""

    model_type = "fused_palm"

    def __init__(
        self,
        hidden_size: int = 32,
        intermediate_size: int = 64,
        num_hidden_layers: int = 3,
        vocab_size: int = 300,
        joined: bool = False,
        **options: object,
    ) -> None:
        super().__init__(**options)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.vocab_size = num_hidden_layers, vocab_size
        self.joined = joined


class PalmBlock(nn.Module):
    """``x + attention(norm(x)) + mlp(norm(x))``, with four heads and a gated MLP."""

    def __init__(self, config: PalmConfig) -> None:
        super().__init__()
        d, h = config.hidden_size, config.intermediate_size
        self.sizes = [d, h, d, h, d]
        self.joined = config.joined
        self.norm, self.into = nn.LayerNorm(d), nn.Linear(d, sum(self.sizes), bias=config.joined)
        if config.joined:
            self.out = nn.Linear(d + h, d)
        else:
            self.attention_out, self.mlp_out = nn.Linear(d, d), nn.Linear(h, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> same."""
        q, gate, k, up, v = self.into(self.norm(x)).split(self.sizes, -1)
        hidden = F.silu(gate) * up
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        attended = attended.transpose(1, 2).flatten(2)
        if self.joined:
            return x + self.out(torch.cat([attended, hidden], -1))
        return x + self.attention_out(attended) + self.mlp_out(hidden)


class PalmModel(PreTrainedModel):
    """Tokens to logits."""

    config_class = PalmConfig

    def __init__(self, config: PalmConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(PalmBlock(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
        """input_ids [B, S] -> logits [B, S, V]."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))
