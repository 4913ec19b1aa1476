"""All slices of one copy share a router row, so that a token takes whole copies."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import RouterMethod, linear


def virtual_group(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Draw one row for each copy from N(0, std^2), and give it to all G slices of the copy.

    Equal rows give equal logits, so the top T = G * t experts are t whole copies. In float32 two
    different copies practically never tie; with logits rounded to bfloat16 they would, and a
    token would get slices of both.

    Args:
        ffn: the dense FFN; only its input width D is read.
        parts: unused.
        spec: ``experts.count`` copies of ``experts.granularity`` slices; ``router.std``.
        generator: draws the rows.
        data: unused.

    Returns:
        ``weight`` [E * G, D], expert ``e * G + g`` with row e, and, if ``router.bias``, ``bias`` of
        zeros; float32.

    Source:
        He et al., "Upcycling Large Language Models into Mixture of Experts", 2024,
        https://arxiv.org/abs/2410.07524
    """
    shape = (spec.experts.count, ffn.up_MFD.shape[-1])
    row_ED = spec.router.std * torch.randn(shape, generator=generator)
    weight_ED = row_ED.repeat_interleave(spec.experts.granularity, dim=0)
    return linear(weight_ED, spec)


VIRTUAL_GROUP = RouterMethod(
    name="virtual_group",
    build=virtual_group,
    kinds=frozenset({"slices"}),
    otherwise="gives the slices of a copy one row, so it needs `experts.method: granular`",
    paper='He et al., "Upcycling Large Language Models into Mixture of Experts", 2024',
    source="https://arxiv.org/abs/2410.07524",
    reads=frozenset({"std"}),
)
