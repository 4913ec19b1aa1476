"""An expert is scored by how well a token points along its keys."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import RouterMethod, linear


def centroid(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Make each router row the mean of the expert's keys, each scaled to length one.

    The centre of the cluster that `experts.method: cluster` finds. Padding is not counted. The
    paper takes the centres nearest to the token scaled to length one; a linear router can take
    those of the largest inner product, which is the same for centres of one length.

    Args:
        ffn: unused.
        parts: E routed experts; the keys are the first I rows of `up_EGD`.
        spec: ``router.bias``.
        generator: unused.
        data: unused.

    Returns:
        ``weight`` [E, D] and, if ``router.bias``, ``bias`` of zeros [E]; float32.

    Source:
        Zhang et al., "MoEfication", 2021, https://arxiv.org/abs/2110.01786
    """
    experts = parts.experts
    width = experts.neuron_EI.shape[1]
    key_EID = torch.nn.functional.normalize(experts.up_EGD[:, :width].float(), dim=-1)
    count_E1 = (experts.neuron_EI >= 0).sum(1, keepdim=True).to(key_EID.device)
    return linear(key_EID.sum(1) / count_E1, spec)


CENTROID = RouterMethod(
    name="centroid",
    build=centroid,
    kinds=frozenset({"split", "subsets"}),
    otherwise="averages the keys of each expert, and copies would all get the same row; "
    "use `router.method: normal` or `virtual_group`, or an expert method that splits",
    paper='Zhang et al., "MoEfication", 2021',
    source="https://arxiv.org/abs/2110.01786",
)
