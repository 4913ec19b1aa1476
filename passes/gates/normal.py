"""A small random router."""

import torch

from upcycle.passes.gates.method import GateMethod, zero_bias
from upcycle.spec import MoESpec
from upcycle.weights import ExpertWeights, FFNWeights, RouterWeights


def normal(
    ffn: FFNWeights, experts: ExpertWeights, spec: MoESpec, *, generator: torch.Generator
) -> RouterWeights:
    """Draw every row from N(0, std^2), independently.

    Says nothing about the input yet: tokens are spread over the experts by chance, and stay with
    their experts from step to step, which is what lets copies grow apart in training.

    Args:
        ffn: the dense FFN; only its input width D is read.
        experts: unused.
        spec: `num_experts` is E; ``router.std`` is the standard deviation.
        generator: draws the rows.

    Returns:
        Weight [E, D] and, if ``router.bias``, zeros [E]; float32.

    Source:
        Komatsuzaki et al., "Sparse Upcycling", 2022, https://arxiv.org/abs/2212.05055
    """
    shape = (spec.num_experts, ffn.up_MFD.shape[-1])
    weight_ED = spec.router.std * torch.randn(shape, generator=generator)
    return RouterWeights(weight_ED, zero_bias(spec))


NORMAL = GateMethod(
    name="normal",
    build=normal,
    kinds=frozenset({"copies", "slices", "split"}),
    needs="works with every expert method",
    paper='Komatsuzaki et al., "Sparse Upcycling", 2022',
    source="https://arxiv.org/abs/2212.05055",
)
