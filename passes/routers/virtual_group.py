"""All slices of one copy share a router row, so that a token takes whole copies."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, drawn_rows, linear


def virtual_group(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw one row for each copy from N(0, std^2), and give it to all G slices of the copy.

    Equal rows give equal logits, so the top T = G * t experts are t whole copies. In float32 two
    different copies practically never tie; with logits rounded to bfloat16 they would, and a
    token would get slices of both.

    Returns:
        ``weight`` [E * G, D], expert ``e * G + g`` with row e, and, if ``router.bias``, ``bias`` of
        zeros; float32.

    Source:
        He et al., "Upcycling Large Language Models into Mixture of Experts", 2024,
        https://arxiv.org/abs/2410.07524
    """
    row_ED = drawn_rows(dense, dense.spec.experts.count)
    weight_ED = row_ED.repeat_interleave(dense.spec.experts.granularity, dim=0)
    return linear(weight_ED, dense.spec)


VIRTUAL_GROUP = RouterMethod(
    name="virtual_group",
    build=virtual_group,
    kinds=frozenset({"slices"}),
    otherwise="gives the slices of a copy one row, so it needs `experts.method: granular`",
    reads=frozenset({"std"}),
)
