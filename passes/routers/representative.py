"""An expert is scored by the activation of one of its neurons."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.markers import mark
from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.experts.split import membership
from upcycle.passes.routers.method import RouterMethod, no_bias, no_nulls


def representative(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Copy the rows of the neuron of each expert that is active most like all of them.

    The score is then ``|h|`` of that neuron, the true one and not a prediction.

    Returns:
        ``weight`` [M, E, D] and, if the FFN has biases, ``bias`` [M, E]; float32.

    Source:
        Pei et al., "CMoE", 2025, https://arxiv.org/abs/2502.04416
    """
    ffn, neuron_EI, markers = dense.ffn, parts.experts.neuron_EI, dense.spec.experts.markers
    few = ffn.of_neurons(representatives(ffn, neuron_EI, dense.data, markers=markers))
    bias = {} if few.up_bias_MF is None else {"bias": few.up_bias_MF.float()}
    return {"weight": few.up_MFD.float(), **bias}


def representatives(
    ffn: FFNWeights, neuron_EI: torch.Tensor, data: FFNInputs, *, markers: int
) -> torch.Tensor:
    """The member of each expert whose markers are nearest to the mean of the members'.

    `neuron_EI`, int64 [E, I], has the neurons of each expert, one at least; negative is padding.
    The result is int64 [E]; the lowest number where several are equally near. Memory: F * T / 8
    bytes.
    """
    member_EF = membership(neuron_EI, ffn.up_MFD.shape[1]).bool()
    far_EF = mark(ffn, data, markers).distances(member_EF)
    return far_EF.masked_fill(~member_EF, torch.inf).argmin(1)


REPRESENTATIVE = RouterMethod(
    name="representative",
    build=representative,
    kinds=frozenset({"split", "subsets"}),
    otherwise="chooses a neuron of each expert, and copies all have the same; "
    "use an expert method that splits",
    needs="activations",
    makes="neurons",
    facts=lambda router, ffn, num_experts: {
        "pointwise": ffn.pointwise,
        "up_bias": ffn.has_up_bias,
    },
    limits=(no_nulls, no_bias),
)
