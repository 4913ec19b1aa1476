"""Every expert is the whole FFN, with noise of its own."""

import torch

from upcycle.passes.experts.matrices import exact, matrices, own_copies
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts


def noise(dense: DenseLayer) -> Parts:
    """Add ``noise * mean|W| * N(0, 1)`` to every weight W of every expert, independently.

    Approximate: the experts differ from the start, so the router gets a gradient, and the layer is
    off by about `noise`. Without noise it is `copy`. Biases stay as they are.

    Returns:
        E experts of width F, none of whose neurons is a dense one any more (origin -2). Memory:
        E times the dense FFN, and one matrix in float32.

    Source:
        Komatsuzaki et al., "Sparse Upcycling", 2022, https://arxiv.org/abs/2212.05055
    """
    spec, experts = dense.spec, own_copies(dense)
    if not spec.experts.noise:
        return Parts(experts)
    for weight_EFX, _ in matrices(experts):
        std = spec.experts.noise * exact(weight_EFX[0]).abs().mean()
        for weight_FX in weight_EFX:
            drawn_FX = torch.randn(weight_FX.shape, generator=dense.generator).to(weight_FX.device)
            weight_FX.copy_(exact(weight_FX) + std * drawn_FX)
    experts.neuron_EI.fill_(-2)
    return Parts(experts)


NOISE = ExpertMethod(name="noise", kind="altered", build=noise)
