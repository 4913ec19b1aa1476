"""How useful each neuron is to every token: what decides which neurons are shared.

Shape suffixes: T tokens, D d_model, F neurons, N domains, G groups of tokens.
"""

from typing import Final

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.markers import mark
from upcycle.passes.experts.method import Need
from upcycle.recipe import schema as recipe

BLOCKS = 64  # of consecutive tokens, where the texts have no domains
NEEDS: Final[dict[str, Need]] = {
    "rate": "activations",
    "contribution": "activations",
    "steady": "activations",
    "importance": "gradients",
    "domains": "gradients",
}


def usefulness(
    ffn: FFNWeights, experts: recipe.Experts, data: FFNInputs | None, *, width: int
) -> torch.Tensor:
    """A score of each neuron by ``experts.shared_by``, [F] float32; larger is more useful.

    - ``first`` prefers low numbers.
    - ``norm``: the product of the lengths of its rows and its column.
    - ``rate``: the part of the tokens that mark it, as `upcycle.passes.experts.markers` does
      (Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416).
    - ``contribution``: the mean of ``|h|`` times the length of its column.
    - ``steady``: its mean activity less the deviation of that between texts
      (after Zhao et al., "ExpertWeaver", 2026, https://arxiv.org/abs/2602.15521).
    - ``importance``: the mean ``|h dL/dh|``
      (Zuo et al., "MoEBERT", 2022, https://arxiv.org/abs/2204.07675).
    - ``domains``: for how many domains it is among the `width` most important neurons; of equals,
      the one of the better mean rank
      (Zhu et al., "LLaMA-MoE", 2024, https://arxiv.org/abs/2406.16554).

    `data` are the calibration tokens, where `NEEDS` asks for them.
    """
    by = experts.shared_by
    length_F: torch.Tensor = ffn.down_OF.float().norm(dim=0)
    if by == "first":
        return -torch.arange(len(length_F), dtype=torch.float32)
    if by == "norm":
        up_F: torch.Tensor = ffn.up_MFD.float().norm(dim=-1).prod(0)
        return length_F * up_F
    assert data is not None, "`passes.needs` asks for it"
    if by == "rate":
        return mark(ffn, data, experts.markers).rate()
    if by == "contribution":
        total_F = torch.zeros_like(length_F)
        for _, h_TF in data.hidden(ffn):
            total_F += h_TF.abs().sum(0) * length_F
        return total_F / max(len(data), 1)
    if by == "steady":
        activity_FG = profile(ffn, data)
        return activity_FG.mean(1) - activity_FG.std(1, correction=0)
    importance_NF = importance_of(data)
    if by == "importance":
        return importance_NF.mean(0)
    rank_NF = ranks(importance_NF)
    is_top_NF = rank_NF > 1 - (width + 0.5) / rank_NF.shape[1]
    return is_top_NF.sum(0) + rank_NF.mean(0) / 2


def importance_of(data: FFNInputs) -> torch.Tensor:
    """The importance of each neuron for each domain, [N, F], which the recipe's needs ask for."""
    assert data.importance_NF is not None, "`passes.needs` asks for gradients"
    return data.importance_NF


def ranks(importance_NF: torch.Tensor) -> torch.Tensor:
    """The rank of each neuron within its domain, from 0 to 1 - 1 / F; the best has the highest.

    So no domain counts more than another because its loss, or its texts, are larger.
    """
    order_NF = importance_NF.argsort(dim=1, stable=True)
    return order_NF.argsort(dim=1).float() / importance_NF.shape[1]


def profile(ffn: FFNWeights, data: FFNInputs) -> torch.Tensor:
    """Mean of ``|a(gate x)|`` over the tokens of each group, [F, G] float32.

    The groups are the domains of the texts if there are several, else 64 blocks of consecutive
    tokens (fewer if there are fewer tokens). Of a gated FFN only the gate counts, which is the
    activation with a one in the place of the other expansions.
    """
    group_T, count = _groups(data)
    total_GF = torch.zeros(count, ffn.up_MFD.shape[1])
    gate_FD = ffn.up_MFD[0].float()
    bias_F = None if ffn.up_bias_MF is None else ffn.up_bias_MF[0].float()
    start = 0
    for x_TD in data.chunks():
        z_TF = torch.nn.functional.linear(x_TD, gate_FD, bias_F)
        others = [torch.ones_like(z_TF)] * (len(ffn.up_MFD) - 1)
        active_TF = ffn.pointwise(z_TF, *others).abs()
        total_GF.index_add_(0, group_T[start : start + len(x_TD)], active_TF)
        start += len(x_TD)
    tokens_G1 = torch.bincount(group_T, minlength=count).clamp(min=1)[:, None]
    return (total_GF / tokens_G1).t()


def _groups(data: FFNInputs) -> tuple[torch.Tensor, int]:
    """The group of each token, [T] int64, and how many groups there are."""
    if data.domain_T is not None:
        domains = 1 + int(data.domain_T.max())
        if domains > 1:
            return data.domain_T, domains
    tokens = len(data)
    count = min(BLOCKS, max(tokens, 1))
    return torch.arange(tokens) * count // max(tokens, 1), count
