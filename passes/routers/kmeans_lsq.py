"""A linear router that sends each cluster of tokens to the expert that is best for it.

Shape suffixes: T tokens, D d_model, E experts and clusters, O d_out.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from upcycle.ir.weights import ExpertWeights, FFNWeights
from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.contributions import regress
from upcycle.passes.routers.method import RouterMethod, linear

STEPS = 50  # of Lloyd's iteration, at most


def kmeans_lsq(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Cluster the tokens into E groups, give each an expert, and regress that on the token.

    The expert of a group has the smallest median of ``|FFN(x) - E_i(x)|^2`` (the shared expert
    counted to both), one to one, with the smallest sum over the groups (Hungarian method; the paper
    is greedy). The regression is on a 1 for that expert and 0 for the others, with the penalty of
    ``router.ridge``. It cannot tell groups apart that lie in a row, as it has one line for each: so
    if the nearest centre, in the space where the groups are round, agrees with more tokens, the
    router computes that instead.

    Memory: T * (D + E) float32.

    Source:
        "MixER", 2025, https://arxiv.org/abs/2502.05335
    """
    ffn, spec, data = dense.ffn, dense.spec, dense.data
    count = spec.num_experts
    x_TD = torch.cat(list(data.chunks()))
    loss_TE = torch.cat([_losses(ffn, parts, some_TD) for some_TD in data.chunks()])
    group_T = clusters(x_TD, count, generator=dense.generator)
    groups = [loss_TE[group_T == g] for g in range(count)]
    loss_GE = torch.stack([g_TE.median(0).values if len(g_TE) else g_TE.sum(0) for g_TE in groups])
    expert_G = torch.from_numpy(linear_sum_assignment(loss_GE.double().numpy())[1].astype(np.int64))
    weight_ED, bias_E = fit(x_TD, expert_G[group_T], count, penalty=spec.router.ridge)
    return linear(weight_ED, spec, bias_E)


def _losses(ffn: FFNWeights, parts: Parts, x_TD: torch.Tensor) -> torch.Tensor:
    """``|FFN(x) - E_i(x) - Shared(x)|^2`` for each expert, [T, E]."""
    ffn = ffn.to(torch.float32)
    left_TO = torch.nn.functional.linear(ffn.hidden(x_TD), ffn.down_OF)
    if parts.shared is not None:
        left_TO = left_TO - _output(ffn, parts.shared, 0, x_TD)
    added = (_output(ffn, parts.experts, e, x_TD) for e in range(len(parts.experts.up_EGD)))
    return torch.stack([(left_TO - y_TO).square().sum(-1) for y_TO in added], dim=-1)


def _output(ffn: FFNWeights, experts: ExpertWeights, e: int, x_TD: torch.Tensor) -> torch.Tensor:
    bias = None if experts.up_bias_EG is None else experts.up_bias_EG[e].float()
    z_TG = torch.nn.functional.linear(x_TD, experts.up_EGD[e].float(), bias)
    hidden_TI = ffn.pointwise(*z_TG.chunk(len(ffn.up_MFD), dim=-1))
    out_TO: torch.Tensor = hidden_TI @ experts.down_EOI[e].float().t()
    return out_TO


def clusters(x_TD: torch.Tensor, count: int, *, generator: torch.Generator) -> torch.Tensor:
    """k-means, from k-means++ centres; the group of each token, [T] int64.

    A group that becomes empty keeps its centre. With fewer distinct tokens than groups some are
    empty.
    """
    far_T = torch.ones(len(x_TD))
    centres = []
    for _ in range(count):
        first = torch.multinomial(far_T if far_T.sum() > 0 else far_T + 1, 1, generator=generator)
        centres.append(x_TD[first])
        near_T = (x_TD - centres[-1]).square().sum(-1)
        far_T = near_T if len(centres) == 1 else torch.minimum(far_T, near_T)
    centre_ED = torch.cat(centres)
    group_T = torch.cdist(x_TD, centre_ED).argmin(-1)
    for _ in range(STEPS):
        size_E1 = torch.bincount(group_T, minlength=count)[:, None]
        sum_ED = torch.zeros_like(centre_ED).index_add(0, group_T, x_TD)
        centre_ED = torch.where(size_E1 > 0, sum_ED / size_E1.clamp(min=1), centre_ED)
        before_T, group_T = group_T, torch.cdist(x_TD, centre_ED).argmin(-1)
        if torch.equal(before_T, group_T):
            break
    return group_T


def fit(
    x_TD: torch.Tensor, label_T: torch.Tensor, count: int, *, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [E, D] and bias [E] whose largest score is the label of as many tokens as possible.

    By least squares, or the nearest centre after whitening, whichever is right more often.
    """
    chunk = 2048
    wanted_TE = torch.nn.functional.one_hot(label_T, count).float()
    pairs = zip(torch.split(x_TD, chunk), torch.split(wanted_TE, chunk), strict=True)
    found = [regress(pairs, penalty=penalty), _nearest_centre(x_TD.double(), label_T, count)]

    def right(scores: tuple[torch.Tensor, torch.Tensor]) -> int:
        weight_ED, bias_E = scores
        chosen_T = (x_TD.double() @ weight_ED.t() + bias_E).argmax(-1)
        return int((chosen_T == label_T).sum())

    return max(found, key=right)  # of equals the first


def _nearest_centre(
    x_TD: torch.Tensor, label_T: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``-|S^-1/2 (x - c_e)|^2 / 2`` without what is the same for all, S the spread within
    the groups, half of it shrunk to its mean variance."""
    size_E1 = torch.bincount(label_T, minlength=count)[:, None].to(x_TD.dtype)
    centre_ED = x_TD.new_zeros(count, x_TD.shape[1]).index_add(0, label_T, x_TD)
    centre_ED = centre_ED / size_E1.clamp(min=1)
    off_TD = x_TD - centre_ED[label_T]
    spread_DD = off_TD.t() @ off_TD / len(x_TD)
    level = spread_DD.diagonal().mean()
    round_DD = torch.eye(len(spread_DD), dtype=x_TD.dtype) * (level if level > 0 else 1.0)
    weight_ED = torch.linalg.solve((spread_DD + round_DD) / 2, centre_ED.t()).t()
    bias_E = -(weight_ED * centre_ED).sum(-1) / 2
    never = bias_E.new_tensor(-1e4)  # a group without tokens
    return weight_ED, torch.where(size_E1[:, 0] > 0, bias_E, never)


KMEANS_LSQ = RouterMethod(
    name="kmeans_lsq",
    build=kmeans_lsq,
    kinds=frozenset({"split", "subsets", "altered"}),
    otherwise="finds the best expert for each group of tokens, and copies are all as good; "
    "use an expert method that splits, or one that changes the copies",
    needs="activations",
    bias=True,
    reads=frozenset({"ridge"}),
)
