"""Every expert holds the most important neurons; the next ones are dealt out."""

import torch

from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import by_turns, split
from upcycle.passes.experts.useful import importance_of


def importance_overlap(dense: DenseLayer) -> torch.Tensor:
    """Give the best neurons to all experts, deal the others in turn, and cut to the width.

    With I the width of an expert, the first ``round(common * I)`` neurons by importance, the mean
    of ``|h dL/dh|``, are in every expert. The others are dealt in turn, the most important first,
    until the experts are full; the rest is in no expert. So the layer is approximate; with one
    expert it is the dense FFN. Neurons that several chosen experts hold are counted several times:
    meant for ``router.top_k: 1``.

    The paper adds up ``w dL/dw`` over the weights of a neuron and a batch, takes the magnitude, and
    then sums over batches. For the contraction that sum is ``h dL/dh`` summed over the batch; here
    the magnitude is taken of each token, so that tokens do not cancel out.

    Source:
        Zuo et al., "MoEBERT", 2022, https://arxiv.org/abs/2204.07675
    """
    width, count = dense.spec.width, dense.spec.num_experts
    order_F = importance_of(dense.data).mean(0).argsort(descending=True, stable=True)
    common = width if count == 1 else round(dense.spec.experts.common * width)
    dealt = order_F[common : common + count * (width - common)]
    own_EI = by_turns(dealt, count, width - common)
    common_EI = order_F[:common].sort().values.expand(count, -1)
    return torch.cat([common_EI, own_EI], dim=1)


IMPORTANCE_OVERLAP = ExpertMethod(
    name="importance_overlap", kind="subsets", build=split(importance_overlap), needs="gradients"
)
