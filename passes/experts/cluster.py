"""Neurons with similar keys share an expert."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.balanced import balanced_clusters
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.partition import deal, group_sizes
from upcycle.passes.experts.split import split


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


def cluster(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> torch.Tensor:
    """Group the neurons by balanced k-means on their keys: the input rows, scaled to length one.

    The dense output is the sum over all experts and the output bias, so the layer is exact when
    every expert is chosen with weight one; with fewer it drops neurons.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E, at most F; `width` is F / E rounded up; ``experts.features``
            names the rows to compare; with ``experts.metric: l2`` they are not scaled.
        generator: draws the first centroids.
        data: unused.

    Returns:
        The neurons of each expert, [E, `width`], -1 as padding where E does not divide F. Memory
        of the experts: that of the dense FFN and the padding, and while it runs a float32
        copy of the features.

    Source:
        Zhang et al., "MoEfication", 2021, section 3.1, https://arxiv.org/abs/2110.01786
    """
    d_ff = ffn.up_MFD.shape[1]
    sizes = group_sizes(d_ff, spec.num_experts)
    features_FD = features_of(ffn, spec.experts.features, spec.experts.metric)
    labels_F = balanced_clusters(features_FD, sizes, generator=generator)
    order_F = labels_F.argsort(stable=True)
    return deal(order_F, spec.num_experts, spec.width)


CLUSTER = ExpertMethod(
    name="cluster",
    kind="split",
    build=split(cluster),
    paper='Zhang et al., "MoEfication", 2021',
    source="https://arxiv.org/abs/2110.01786",
)
