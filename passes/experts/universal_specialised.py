"""Neurons that rise and fall together, from text to text, share an expert."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.balanced import balanced_clusters
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.partition import deal, group_sizes
from upcycle.passes.experts.profile import profile
from upcycle.passes.experts.split import split


def universal_specialised(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> torch.Tensor:
    """Group the specialised neurons by balanced k-means on their activity in each kind of text.

    The profile of a neuron is the mean of its gate's ``|a(z)|`` in each domain, or in each block
    of consecutive tokens where there are no domains, centred and scaled to length one. The
    universal neurons, which are active everywhere, are those of ``experts.shared`` with
    ``shared_by: steady``; how many a layer has is its own with ``experts.adaptive``.

    Made from the abstract of the paper: its formulas, which are not public, may differ.

    The dense output is the sum over all experts, the shared one and the output bias, so the layer
    is exact when every expert is chosen with weight one; with fewer it drops neurons.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept; the paper's is gated.
        spec: `num_experts` is E, at most F; `width` is F / E rounded up.
        generator: draws the first centroids.
        data: the calibration tokens; F numbers for each of at most 64 groups of texts are kept.

    Returns:
        The neurons of each expert, [E, `width`], -1 as padding where E does not divide F. Memory
        of the experts: that of the dense FFN, and the padding.

    Source:
        Zhao et al., "ExpertWeaver", 2026, https://arxiv.org/abs/2602.15521
    """
    assert data is not None, "`passes.needs` asks for it"
    activity_FG = profile(ffn, data)
    centred_FG = activity_FG - activity_FG.mean(1, keepdim=True)
    sizes = group_sizes(len(activity_FG), spec.num_experts)
    features_FG = torch.nn.functional.normalize(centred_FG, dim=1)
    labels_F = balanced_clusters(features_FG, sizes, generator=generator)
    return deal(labels_F.argsort(stable=True), spec.num_experts, spec.width)


UNIVERSAL_SPECIALISED = ExpertMethod(
    name="universal_specialised",
    kind="split",
    build=split(universal_specialised),
    paper='Zhao et al., "ExpertWeaver", 2026',
    source="https://arxiv.org/abs/2602.15521",
    needs=frozenset({"activations"}),
)
