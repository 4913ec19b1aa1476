"""Which experts a token visits, from the scores of a router.

Each rule takes scores [T, E] in float32 or float64 and returns `index` [T, K] int64, distinct in a
row, and `mask` [T, K] bool, or None where every entry is an expert that the token visits.

Shape suffixes: T tokens, E experts, K chosen experts at most.
"""

import math
from collections.abc import Callable

import torch

from upcycle.layers.config import SelectConfig

Selected = tuple[torch.Tensor, torch.Tensor | None]


def top_k(scores_TE: torch.Tensor, *, k: int) -> Selected:
    """The k best experts."""
    return scores_TE.topk(k, dim=-1).indices, None


def everything(scores_TE: torch.Tensor, *, k: int) -> Selected:
    """All experts."""
    index_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    return index_E.expand(scores_TE.shape), None


def top_p(scores_TE: torch.Tensor, *, k: int, mass: float) -> Selected:
    """The fewest best experts whose probability exceeds `mass`, one at least and k at most.

    Huang et al., "Harder Tasks Need More Experts", 2024, https://arxiv.org/abs/2403.07652
    """
    p_TK, index_TK = scores_TE.softmax(-1).topk(k, dim=-1)
    before_TK = p_TK.cumsum(-1) - p_TK
    return index_TK, before_TK <= mass


def entropy(scores_TE: torch.Tensor, *, k: int, mass: float, above: float, q: float) -> Selected:
    """All experts where the router is unsure, else those within `mass`, and k at least.

    Unsure is a Tsallis entropy of index `q`, divided by that of the uniform distribution, over
    `above`. Unlike `top_p` the expert that crosses `mass` is left out, as in the authors' code.
    Li et al., "DynMoLE", 2025, https://arxiv.org/abs/2504.00661
    """
    p_TE = scores_TE.softmax(-1)
    count = p_TE.shape[-1]
    sorted_TE, index_TE = p_TE.topk(count, dim=-1)
    mask_TE = sorted_TE.cumsum(-1) <= mass
    mask_TE = mask_TE | (torch.arange(count, device=p_TE.device) < k)
    return index_TE, mask_TE | (tsallis_entropy(p_TE, q) > above)[:, None]


def tsallis_entropy(p_TE: torch.Tensor, q: float) -> torch.Tensor:
    """Tsallis entropy of index q of each row over that of the uniform row, in [0, 1]; q = 1 is
    Shannon's."""
    count = p_TE.shape[-1]
    if count == 1:
        return p_TE.new_zeros(len(p_TE))
    if q == 1:
        tiny = torch.finfo(p_TE.dtype).tiny
        return -(p_TE * p_TE.clamp(min=tiny).log()).sum(-1) / math.log(count)
    entropy_T: torch.Tensor = (1 - p_TE.pow(q).sum(-1)) / (1 - float(count) ** (1 - q))
    return entropy_T


def null(scores_TE: torch.Tensor, *, k: int, nulls: int) -> Selected:
    """Of the k best, those that are not among the last `nulls`, which stand for doing nothing.

    A tie goes to the true expert.
    Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233
    """
    count = scores_TE.shape[1] - nulls
    best_TK, index_TK = scores_TE[:, :count].topk(min(k, count), dim=-1)
    before_K = torch.arange(best_TK.shape[1], device=scores_TE.device)
    nulls_TK = (scores_TE[:, None, count:] > best_TK[:, :, None]).sum(-1)
    return index_TK, before_K + nulls_TK < k


def expert_choice(scores_TE: torch.Tensor, *, k: int) -> Selected:
    """Each expert takes its T * k / E best tokens, rounded up: k experts a token on average.

    What a token gets depends on the other tokens, so it is for encoders.
    Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022,
    https://arxiv.org/abs/2202.09368
    """
    tokens, count = scores_TE.shape
    best_CE = scores_TE.softmax(-1).topk((tokens * k + count - 1) // count, dim=0).indices
    index_E = torch.arange(count, device=scores_TE.device)
    return index_E.expand(scores_TE.shape), torch.zeros_like(scores_TE).scatter(0, best_CE, 1.0) > 0


SELECT: dict[str, Callable[..., Selected]] = {
    "top_k": top_k,
    "all": everything,
    "top_p": top_p,
    "entropy": entropy,
    "null": null,
    "expert_choice": expert_choice,
}


def select(scores_TE: torch.Tensor, config: SelectConfig) -> Selected:
    """Apply the rule of `config`."""
    return SELECT[config.rule](scores_TE, **config.arguments)
