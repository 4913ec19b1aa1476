"""How active each neuron is in each kind of text.

Shape suffixes: T tokens, D d_model, F neurons, G groups of tokens.
"""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights

BLOCKS = 64  # of consecutive tokens, where the texts have no domains


def profile(ffn: FFNWeights, data: FFNInputs) -> torch.Tensor:
    """Mean of ``|a(gate x)|`` over the tokens of each group, [F, G] float32.

    The groups are the domains of the texts if there are several, else 64 blocks of consecutive
    tokens (fewer if there are fewer tokens). Of a gated FFN only the gate counts, which is the
    activation with a one in the place of the other expansions.
    """
    group_T, count = _groups(data)
    total_GF = torch.zeros(count, ffn.up_MFD.shape[1])
    gate_FD = ffn.up_MFD[0].float()
    bias_F = None if ffn.up_bias_MF is None else ffn.up_bias_MF[0].float()
    start = 0
    for x_TD in data.chunks():
        z_TF = torch.nn.functional.linear(x_TD, gate_FD, bias_F)
        others = [torch.ones_like(z_TF)] * (len(ffn.up_MFD) - 1)
        active_TF = ffn.pointwise(z_TF, *others).abs()
        total_GF.index_add_(0, group_T[start : start + len(x_TD)], active_TF)
        start += len(x_TD)
    tokens_G1 = torch.bincount(group_T, minlength=count).clamp(min=1)[:, None]
    return (total_GF / tokens_G1).t()


def _groups(data: FFNInputs) -> tuple[torch.Tensor, int]:
    """The group of each token, [T] int64, and how many groups there are."""
    if data.domain_T is not None:
        domains = 1 + int(data.domain_T.max())
        if domains > 1:
            return data.domain_T, domains
    tokens = len(data)
    count = min(BLOCKS, max(tokens, 1))
    return torch.arange(tokens) * count // max(tokens, 1), count
