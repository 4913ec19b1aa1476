"""Every expert is the whole FFN."""

import torch

from upcycle.ir.weights import ExpertWeights, FFNWeights, gather_experts
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts


def copy(dense: DenseLayer) -> Parts:
    """Repeat the dense FFN as every expert.

    The layer computes ``sum_k w_k FFN(x)``, so it is exact for every router and every top_k if the
    weights of the chosen experts sum to one. With ``experts.shared: 1`` there is a permanent copy,
    too, and the layer computes the mean of it and of the chosen ones, ``(FFN(x) + sum_k w_k
    FFN(x)) / 2``, as Cong et al., "GNT-MOVE", 2023, https://arxiv.org/abs/2308.11793; as exact.

    Returns:
        E experts of width F, and the permanent one. Without that one the experts are views of the
        dense FFN, which takes no memory, so nothing may be written into them; with it E + 1 times
        the dense FFN.

    Source:
        Komatsuzaki et al., "Sparse Upcycling", 2022, https://arxiv.org/abs/2212.05055
    """
    ffn, neuron_1F = dense.ffn, torch.arange(dense.d_ff)[None]
    neuron_EF = neuron_1F.repeat(dense.spec.num_experts, 1)
    if not dense.spec.shared:
        return Parts(_views(ffn, neuron_EF))
    experts, permanent = (gather_experts(ffn, n, down_scale=0.5) for n in (neuron_EF, neuron_1F))
    return Parts(experts, permanent)


def _views(ffn: FFNWeights, neuron_EF: torch.Tensor) -> ExpertWeights:
    """The dense FFN seen E times, each time the same memory."""
    count, bias_MF = len(neuron_EF), ffn.up_bias_MF
    return ExpertWeights(
        up_EGD=ffn.up_MFD.flatten(0, 1).expand(count, -1, -1),
        up_bias_EG=None if bias_MF is None else bias_MF.flatten().expand(count, -1),
        down_EOI=ffn.down_OF.expand(count, -1, -1),
        neuron_EI=neuron_EF,
    )


COPY = ExpertMethod(name="copy", kind="copies", build=copy)
