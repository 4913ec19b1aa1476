"""A router whose scores get noise of learned size in training."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, drawn_rows, linear


def noisy_topk(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw the rows from N(0, std^2), and start the noise at the same size everywhere.

    In training the score of an expert is ``w x + e (softplus(v x) + 0.01)`` with e standard normal
    and v zero at first, so that the noise is ``ln 2 + 0.01``; in evaluation it is ``w x``.

    Returns:
        ``weight`` and ``noise_weight`` [E, D] and, if ``router.bias``, ``bias`` of zeros [E];
        float32.

    Source:
        Shazeer et al., "Outrageously Large Neural Networks", 2017,
        https://arxiv.org/abs/1701.06538
    """
    made = linear(drawn_rows(dense, dense.spec.num_experts), dense.spec)
    return {**made, "noise_weight": torch.zeros_like(made["weight"])}


NOISY_TOPK = RouterMethod(
    name="noisy_topk",
    build=noisy_topk,
    kinds=ALL_KINDS - {"slices"},
    otherwise="adds noise to each expert by itself, which tears the slices of a copy apart; use "
    "`router.method: virtual_group`",
    makes="noisy",
    reads=frozenset({"std"}),
)
