"""The neuron that stands for each expert: the member that is marked most like its group."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.markers import mark


def representatives(
    ffn: FFNWeights, neuron_EI: torch.Tensor, data: FFNInputs, *, markers: int
) -> torch.Tensor:
    """The member of each expert whose markers are nearest to the mean of the members'.

    Args:
        ffn: the dense FFN, with all its neurons.
        neuron_EI: [E, I] int64, the neurons of each expert, one at least; negative is padding.
        data: the calibration tokens; F * T / 8 bytes are kept of them.
        markers: neurons marked in a token, ``experts.markers``.

    Returns:
        [E] int64, neurons of `ffn`; of several equally near, that of the lowest number.

    Source:
        Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416
    """
    d_ff = ffn.up_MFD.shape[1]
    member_EF = torch.zeros(len(neuron_EI), d_ff + 1, dtype=torch.bool)
    member_EF.scatter_(1, torch.where(neuron_EI < 0, d_ff, neuron_EI), True)
    member_EF = member_EF[:, :d_ff]
    far_EF = mark(ffn, data, markers).distances(member_EF)
    return far_EF.masked_fill(~member_EF, torch.inf).argmin(1)
