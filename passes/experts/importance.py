"""Neurons are dealt out by importance, so that every expert gets some of the best."""

import torch

from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import by_turns, split
from upcycle.passes.experts.useful import importance_of


def importance(dense: DenseLayer) -> torch.Tensor:
    """Deal the neurons in turn, the most important first.

    The importance of a neuron is the mean of ``|h dL/dh|`` over the calibration tokens. With
    ``experts.shared`` and ``shared_by: importance`` the most important ones are in the shared
    expert. For one expert a token at weight one that is the paper's layer with its neurons
    that all experts share stored once, and without its loss of the others;
    `importance_overlap` is the paper's own.

    Exact when every expert is chosen with weight one.

    Source:
        Zuo et al., "MoEBERT", 2022, https://arxiv.org/abs/2204.07675
    """
    order_F = importance_of(dense.data).mean(0).argsort(descending=True, stable=True)
    return by_turns(order_F, dense.spec.num_experts, dense.spec.width)


IMPORTANCE = ExpertMethod(
    name="importance", kind="split", build=split(importance), needs="gradients"
)
