"""One expert for each kind of token: the neurons that this kind uses most."""

import torch

from upcycle.ir.spec import MoESpec
from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import split
from upcycle.passes.transform.least_squares import Sums, solve

TOKENS = 12_288  # at most, evenly taken
ROUNDS = 8
SKETCH = 48  # random directions in which tokens are first grouped
PRIOR = 30.0  # tokens' worth of the mean over all kinds in each kind, against chance in small ones
PENALTY = 3e-3


def token_sets(dense: DenseLayer) -> torch.Tensor:
    """Group the tokens, and give each group the neurons that contribute most to its outputs.

    A neuron may be in several experts, or in none. Turns between two steps, as k-means does: the
    expert of a group holds the neurons with the largest mean square of ``|h_j|`` times the length
    of their column; a token goes to the expert whose neurons have the largest sum of sizes, *as a
    linear function of the token predicts them*, which is what `router.method: ridge` computes. So
    it is made for ``router.top_k: 1`` and weights one. Approximate.

    Memory: sizes and inputs of 12,288 tokens at most, float32.

    Source:
        upcycle; the idea of one pruned FFN for each kind of token is that of Gao et al., "ToMoE",
        2025, https://arxiv.org/abs/2501.15316, which trains it
    """
    spec, data = dense.spec, dense.data
    length_F = dense.ffn.down_OF.float().norm(dim=0)
    step = -(-len(data) // TOKENS)
    sizes, inputs = [], []
    start = 0
    for x_TD, h_TF in data.hidden(dense.ffn):
        these = slice(-start % step, None, step)
        sizes.append(h_TF[these].abs() * length_F)
        inputs.append(torch.cat([x_TD[these], torch.ones(len(x_TD[these]), 1)], dim=1))
        start += len(x_TD)
    size_TF, x_TP = torch.cat(sizes), torch.cat(inputs)
    # Each token counts alike: a few of a language model would otherwise decide alone.
    weight_T = 1 / size_TF.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    sums = Sums.zeros(x_TP.shape[1], size_TF.shape[1])
    sums.add(x_TP, size_TF, torch.ones(len(x_TP)))
    predicted_TF = x_TP @ solve(sums, torch.full((x_TP.shape[1],), PENALTY))
    energy_TF = size_TF.square_() * weight_T[:, None]
    label_T = _first_groups(predicted_TF, spec.num_experts, dense.generator)
    for _ in range(ROUNDS):
        set_EI = _sets(energy_TF, label_T, spec)
        held_EF = torch.zeros(spec.num_experts, energy_TF.shape[1]).scatter_(1, set_EI, 1.0)
        before_T, label_T = label_T, (predicted_TF @ held_EF.t()).argmax(1)
        if torch.equal(before_T, label_T):
            break
    return _sets(energy_TF, label_T, spec).sort(dim=1).values


def _sets(energy_TF: torch.Tensor, label_T: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """The `width` neurons that contribute most in each group of tokens, [E, I]."""
    total_EF = torch.zeros(spec.num_experts, energy_TF.shape[1]).index_add_(0, label_T, energy_TF)
    count_E1 = torch.bincount(label_T, minlength=spec.num_experts)[:, None]
    mean_EF = (total_EF + PRIOR * energy_TF.mean(0)) / (count_E1 + PRIOR)
    return mean_EF.topk(spec.width, dim=1).indices


def _first_groups(
    predicted_TF: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """A few rounds of k-means in a random sketch, [T] int64."""
    drawn_FS = torch.randn(predicted_TF.shape[1], SKETCH, generator=generator)
    sketch_TS = (predicted_TF - predicted_TF.mean(0)) @ drawn_FS
    drawn_T = torch.randperm(len(sketch_TS), generator=generator)
    centre_ES = sketch_TS[drawn_T[torch.arange(count) % len(drawn_T)]]  # again, if tokens are few
    for _ in range(6):
        label_T = torch.cdist(sketch_TS, centre_ES).argmin(1)
        count_E1 = torch.bincount(label_T, minlength=count)[:, None].clamp(min=1)
        centre_ES = torch.zeros_like(centre_ES).index_add_(0, label_T, sketch_TS) / count_E1
    return label_T


TOKEN_SETS = ExpertMethod(
    name="token_sets", kind="subsets", build=split(token_sets), needs="activations"
)
