"""Every expert is the whole FFN, with noise in the directions that matter least."""

import torch

from upcycle.passes.experts.matrices import exact, matrices, own_copies
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts


def svd(dense: DenseLayer) -> Parts:
    """Keep the `rank` largest singular directions of each matrix, and shake the other values.

    With ``W = sum_i s_i u_i v_i'``, an expert has ``s_i + noise * mean(s of the rest) * N(0, 1)``
    in the place of s_i beyond `rank`. Biases stay as they are.

    Approximate; without noise it is `copy`, and so it is for matrices of no more than `rank`.

    Returns:
        As `noise`. Memory: E times the dense FFN, and three times one matrix in float32. Time: one
        singular value decomposition for each matrix.

    Source:
        structural-moe-upcycling, 2026, https://github.com/simjay/structural-moe-upcycling
    """
    spec, experts = dense.spec, own_copies(dense)
    if not spec.experts.noise:
        return Parts(experts)
    for weight_EFX, _ in matrices(experts):
        u_FR, s_R, v_RX = torch.linalg.svd(exact(weight_EFX[0]), full_matrices=False)
        rank = spec.experts.rank
        u_FR, s_R, v_RX = u_FR[:, rank:], s_R[rank:], v_RX[rank:]
        std = spec.experts.noise * s_R.mean()
        for weight_FX in weight_EFX:
            drawn_R = torch.randn(s_R.shape, generator=dense.generator).to(s_R)
            weight_FX.copy_(exact(weight_FX) + (u_FR * (std * drawn_R)) @ v_RX)
    experts.neuron_EI.fill_(-2)
    return Parts(experts)


SVD = ExpertMethod(name="svd", kind="altered", build=svd)
