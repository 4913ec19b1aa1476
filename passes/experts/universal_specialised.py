"""Neurons that rise and fall together, from text to text, share an expert."""

import torch

from upcycle.passes.experts.balanced import balanced_clusters
from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import deal, group_sizes, split
from upcycle.passes.experts.useful import profile


def universal_specialised(dense: DenseLayer) -> torch.Tensor:
    """Group the specialised neurons by balanced k-means on their activity in each kind of text.

    The profile of a neuron is the mean of its gate's ``|a(z)|`` in each domain, or in each block
    of consecutive tokens where there are no domains, centred and scaled to length one. The
    universal neurons, which are active everywhere, are those of ``experts.shared`` with
    ``shared_by: steady``; how many a layer has is its own with ``experts.adaptive``.

    Made from the abstract of the paper: its formulas, which are not public, may differ.

    Exact when every expert is chosen with weight one.
    Memory: F numbers for each of at most 64 groups of texts, beside those of a split.

    Source:
        Zhao et al., "ExpertWeaver", 2026, https://arxiv.org/abs/2602.15521
    """
    spec, activity_FG = dense.spec, profile(dense.ffn, dense.data)
    centred_FG = activity_FG - activity_FG.mean(1, keepdim=True)
    sizes = group_sizes(len(activity_FG), spec.num_experts)
    features_FG = torch.nn.functional.normalize(centred_FG, dim=1)
    labels_F = balanced_clusters(features_FG, sizes, generator=dense.generator)
    return deal(labels_F.argsort(stable=True), spec.num_experts, spec.width)


UNIVERSAL_SPECIALISED = ExpertMethod(
    name="universal_specialised",
    kind="split",
    build=split(universal_specialised),
    needs="activations",
)
