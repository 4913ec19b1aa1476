"""Neurons with similar keys share an expert."""

import torch

from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.balanced import balanced_clusters
from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import deal, group_sizes, split


def features_of(ffn: FFNWeights, which: str, metric: str = "cosine") -> torch.Tensor:
    """The rows that describe each neuron, in float32, [F, D] or [F, M * D].

    ``gate`` is the expansion that the activation reads, ``up`` the last one, ``both`` all of them
    side by side. A plain FFN has one expansion, which is the answer to each. With ``cosine`` each
    row counts as one of length one, and so does the whole; with ``l2`` rows are as they are.
    """
    chosen = {"gate": ffn.up_MFD[:1], "up": ffn.up_MFD[-1:], "both": ffn.up_MFD}[which].float()
    if metric == "cosine":
        chosen = torch.nn.functional.normalize(chosen, dim=-1) / len(chosen) ** 0.5
    features_FG: torch.Tensor = chosen.transpose(0, 1).flatten(1)
    return features_FG


def cluster(dense: DenseLayer) -> torch.Tensor:
    """Group the neurons by balanced k-means on their keys: the input rows, scaled to length one.

    Exact when every expert is chosen with weight one. ``experts.features`` names the rows to
    compare; with ``experts.metric: l2`` they are not scaled. Memory: a float32 copy of them.

    Source:
        Zhang et al., "MoEfication", 2021, section 3.1, https://arxiv.org/abs/2110.01786
    """
    spec = dense.spec
    sizes = group_sizes(dense.d_ff, spec.num_experts)
    features_FD = features_of(dense.ffn, spec.experts.features, spec.experts.metric)
    labels_F = balanced_clusters(features_FD, sizes, generator=dense.generator)
    return deal(labels_F.argsort(stable=True), spec.num_experts, spec.width)


CLUSTER = ExpertMethod(name="cluster", kind="split", build=split(cluster))
