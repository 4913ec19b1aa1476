"""Every expert is the whole FFN, with some of its neurons drawn anew."""

import math

import torch

from upcycle.passes.experts.matrices import exact, matrices, own_copies
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts


def drop(dense: DenseLayer) -> Parts:
    """Redraw ``floor(ratio * F)`` neurons of every expert from N(m, s^2).

    m and s are the mean and the standard deviation of the redrawn part of each matrix, and of its
    biases. With ``index_set: neuron``, as the paper says, an expert loses the same neurons from
    all matrices, and about ``1 - ratio`` of the cosine with the dense FFN stays. With ``matrix``,
    as the released code does it, each matrix loses rows of its own: for a gated FFN only
    ``(1 - ratio)^3`` of the neurons stay whole.

    Approximate; with ``ratio: 0`` it is `copy`.

    Returns:
        E experts of width F; neurons that were redrawn in any matrix have the origin -2. Memory:
        E times the dense FFN, and one matrix in float32.

    Source:
        Nakamura et al., "Drop-Upcycling", 2025, https://arxiv.org/abs/2502.19261
    """
    spec, d_ff, generator = dense.spec, dense.d_ff, dense.generator
    experts = own_copies(dense)
    count = math.floor(spec.experts.ratio * d_ff + 1e-9)  # 0.29 of 100 is 29
    for expert in range(spec.num_experts):
        some_R = torch.randperm(d_ff, generator=generator)[:count]
        for weight_EFX, bias_EF in matrices(experts):
            if spec.experts.index_set == "matrix":
                some_R = torch.randperm(d_ff, generator=generator)[:count]
            _redraw(weight_EFX[expert], some_R, generator)
            if bias_EF is not None:
                _redraw(bias_EF[expert], some_R, generator)
            experts.neuron_EI[expert, some_R] = -2
    return Parts(experts)


def _redraw(rows: torch.Tensor, some_R: torch.Tensor, generator: torch.Generator) -> None:
    """Replace the rows `some_R` by normal numbers of the same mean and standard deviation."""
    if not len(some_R):
        return
    old = exact(rows[some_R])
    drawn = torch.randn(old.shape, generator=generator).to(old)
    rows[some_R] = (old.mean() + old.std(correction=0) * drawn).to(rows.dtype)


DROP = ExpertMethod(name="drop", kind="altered", build=drop)
