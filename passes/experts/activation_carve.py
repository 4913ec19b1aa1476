"""Neurons that fire for the same tokens share an expert."""

import numpy as np
import torch

from upcycle.passes.experts.balanced import assign
from upcycle.passes.experts.markers import Markers, mark
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts
from upcycle.passes.experts.split import deal, group_sizes, shared_neurons, split_parts

STEPS = 10  # of Lloyd's iteration at most; the authors' code takes one


def activation_carve(dense: DenseLayer) -> Parts:
    """Group the neurons by which tokens they are among the strongest for.

    In each token the ``experts.markers`` neurons of largest ``|h|`` are marked, with the token and
    the rows scaled to length one. What describes a neuron is its column of marks. The groups are
    found by Lloyd's iteration in the L1 distance, which for marks is the Hamming distance, starting
    at the columns of the most often marked neurons; each step assigns exactly, subject to the
    sizes. With ``experts.shared_by: rate`` the shared expert has the most often marked neurons, as
    in the paper, whose FFNs are gated; marks are drawn among all neurons.

    Exact when every expert is chosen with weight one.
    Memory: F * T / 8 bytes of marks and E * F float64, beside those of a split.

    Source:
        Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416
    """
    spec = dense.spec
    markers = mark(dense.ffn, dense.data, spec.experts.markers)
    shared_S, rest_F = shared_neurons(dense)
    labels_F = carve(markers.of_neurons(rest_F), group_sizes(len(rest_F), spec.num_experts))
    local_EI = deal(labels_F.argsort(stable=True), spec.num_experts, spec.width)
    return split_parts(dense.ffn, shared_S, rest_F, local_EI)


def carve(markers: Markers, sizes: list[int]) -> torch.Tensor:
    """The group of each row of marks, [F] int64, in groups of exactly `sizes`.

    A mean contains the row itself, which holds the row in its group, so that part is taken out of
    the distance to the own mean (Hartigan's rule), after the first step.
    """
    rate_F = markers.rate()
    sizes_K, prices_K = torch.tensor(sizes), np.zeros(len(sizes))
    group_K1 = torch.arange(len(sizes))[:, None]
    first_K = rate_F.argsort(descending=True, stable=True)[: len(sizes)]
    member_KF = torch.arange(len(markers)) == first_K[:, None]
    far_KF = markers.distances(member_KF)
    labels_F, total = torch.zeros(len(markers), dtype=torch.int64), np.inf
    for _ in range(STEPS):
        new_F, prices_K = assign(far_KF.double().numpy(), sizes_K.numpy(), prices_K)
        new_labels_F = torch.from_numpy(new_F)
        member_KF = new_labels_F == group_K1
        far_KF = markers.distances(member_KF)
        new_total = float(far_KF[member_KF].double().sum())
        if new_total >= total:
            break
        labels_F, total = new_labels_F, new_total
        own_F = 2 * rate_F * markers.tokens / sizes_K[labels_F]
        far_KF += member_KF * own_F
    return labels_F


ACTIVATION_CARVE = ExpertMethod(
    name="activation_carve", kind="split", build=activation_carve, needs="activations"
)
