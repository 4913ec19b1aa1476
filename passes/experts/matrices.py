"""Copies of the FFN in memory of their own, and their matrices, for methods that change copies.

Shape suffixes: E experts, F neurons, D d_model, O d_out, M expansions.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from upcycle.ir.weights import ExpertWeights, tensors_of
from upcycle.passes.experts.copy import copy
from upcycle.passes.experts.method import DenseLayer


def matrices(experts: ExpertWeights) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The expansions in order [E, F, D], then the contraction [E, F, O], with biases [E, F].

    They share the memory of `experts`: what is written into them is written there.
    """
    d_ff = experts.neuron_EI.shape[1]
    ups = torch.split(experts.up_EGD, d_ff, dim=1)
    biases: Sequence[torch.Tensor | None] = [None] * len(ups)
    if experts.up_bias_EG is not None:
        biases = torch.split(experts.up_bias_EG, d_ff, dim=1)
    down_EFO = experts.down_EOI.transpose(1, 2)
    return [*zip(ups, biases, strict=True), (down_EFO, None)]


def own_copies(dense: DenseLayer) -> ExpertWeights:
    """The experts of `copy`, each in memory of its own, so that they can be changed."""
    experts, whole = copy(dense).experts, torch.contiguous_format
    own = {name: t.clone(memory_format=whole) for name, t in tensors_of(experts).items()}
    return replace(experts, **own)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers in the dtype to compute in: float32, or float64 as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
