"""Neurons are dealt out by importance, so that every expert gets some of the best."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.partition import by_turns
from upcycle.passes.experts.split import split
from upcycle.passes.experts.useful import importance_of


def importance(
    ffn: FFNWeights,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> torch.Tensor:
    """Deal the neurons in turn, the most important first.

    The importance of a neuron is the mean of ``|h dL/dh|`` over the calibration tokens. With
    ``experts.shared`` and ``shared_by: importance`` the most important ones are in the shared
    expert. For one expert a token at weight one that is the paper's layer with its neurons
    that all experts share stored once, and without its loss of the others;
    `importance_overlap` is the paper's own.

    The dense output is the sum over all experts and the output bias, so the layer is exact when
    every expert is chosen with weight one; with fewer it drops neurons.

    Args:
        ffn: any dense FFN, in one float dtype, which is kept.
        spec: `num_experts` is E, at most F; `width` is F / E rounded up.
        generator: unused.
        data: only ``importance_NF`` is read.

    Returns:
        The neurons of each expert, [E, `width`], -1 as padding where E does not divide F. Memory
        of the experts: that of the dense FFN, and the padding.

    Source:
        Zuo et al., "MoEBERT", 2022, https://arxiv.org/abs/2204.07675
    """
    order_F = importance_of(data).mean(0).argsort(descending=True, stable=True)
    return by_turns(order_F, spec.num_experts, spec.width)


IMPORTANCE = ExpertMethod(
    name="importance",
    kind="split",
    build=split(importance),
    paper='Zuo et al., "MoEBERT", 2022',
    source="https://arxiv.org/abs/2204.07675",
    needs=frozenset({"gradients"}),
)
