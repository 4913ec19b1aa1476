"""Make the weights of one MoE layer, put them into the layer, and take a split back.

Shape suffixes: E experts, I neurons of an expert, F neurons of the FFN, D d_model, M expansions,
O d_out.
"""

import torch

from upcycle.errors import UnsupportedError, UsageError
from upcycle.moe import MoE
from upcycle.passes.experts import EXPERTS
from upcycle.passes.gates import GATES
from upcycle.spec import MoESpec
from upcycle.weights import ExpertWeights, FFNWeights, MoEWeights


def transform(ffn: FFNWeights, spec: MoESpec) -> MoEWeights:
    """Build experts and router for one dense FFN: a pure function of its arguments.

    What it promises is ``spec.promise``.

    Args:
        ffn: the dense weights, in one float dtype, which the experts keep.
        spec: the decision, from `upcycle.passes.plan.make_plan`.

    Returns:
        Experts, a float32 router, and the output bias of the FFN, which the layer adds once.
        Memory: the experts, and what their method says.
    """
    experts = EXPERTS[spec.experts.method].build(ffn, spec, generator=spec.generator("experts"))
    router = GATES[spec.router.method].build(ffn, experts, spec, generator=spec.generator("router"))
    return MoEWeights(experts=experts, router=router, output_bias_O=ffn.down_bias_O)


@torch.no_grad()
def load_weights(layer: MoE, weights: MoEWeights) -> None:
    """Copy the weights into the runtime layer, in the dtype and on the device of the layer.

    Raises:
        UsageError: the layer was made for another shape, or has a tensor that the weights lack.
    """
    experts, router = layer.experts, layer.router
    for name, to, given in (
        ("up projection", experts.up_EGD, weights.experts.up_EGD),
        ("up bias", experts.up_bias_EG, weights.experts.up_bias_EG),
        ("down projection", experts.down_proj, weights.experts.down_EOI),
        ("router", router.weight, weights.router.weight_ED),
        ("router bias", router.bias, weights.router.bias_E),
        ("output bias", layer.output_bias, weights.output_bias_O),
    ):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (to, given)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the {name} is {shapes[0]} in the layer and {shapes[1]} in the weights; "
                "make the layer from the `layer_config()` of the spec that made the weights"
            )
        if to is not None and given is not None:
            to.copy_(given)


def merge_to_dense(experts: ExpertWeights, ffn: FFNWeights) -> FFNWeights:
    """Put the experts of a split back together, each neuron in its old place, without padding.

    Right after the split the result is the dense FFN bit for bit; after training it is the layer
    with all experts chosen and weights one.

    Args:
        experts: made by a split method, then possibly trained; one float dtype, which is kept.
        ffn: the FFN that they were made from; only its activation, its shapes and its output bias
            are read.

    Returns:
        A dense FFN in new memory; `down_bias_O` is that of `ffn`.

    Raises:
        UnsupportedError: the experts do not hold each neuron of `ffn` once, unscaled.

    Source:
        Qiu et al., "EMoE", 2023, https://arxiv.org/abs/2310.10908
    """
    arity, d_ff, d_model = ffn.up_MFD.shape
    num_experts, width = experts.neuron_EI.shape
    neuron = experts.neuron_EI.flatten()
    slots = (neuron >= 0).nonzero().squeeze(1)
    slot_F = slots[neuron[slots].argsort()]
    is_split = torch.equal(neuron[slot_F], torch.arange(d_ff))
    if not is_split or experts.up_scale != 1 or experts.down_scale != 1:
        raise UnsupportedError(
            "only the experts of a split make up one dense FFN; copies and slices of copies "
            "cannot be merged"
        )
    up_MSD = experts.up_EGD.reshape(num_experts, arity, width, d_model).transpose(0, 1)
    bias_MF = None
    if experts.up_bias_EG is not None:
        bias_MS = experts.up_bias_EG.reshape(num_experts, arity, width).transpose(0, 1)
        bias_MF = bias_MS.reshape(arity, -1)[:, slot_F]
    down_OEI = experts.down_EOI.transpose(0, 1)
    return FFNWeights(
        pointwise=ffn.pointwise,
        up_MFD=up_MSD.reshape(arity, -1, d_model)[:, slot_F],
        up_bias_MF=bias_MF,
        down_OF=down_OEI.reshape(len(down_OEI), -1)[:, slot_F],
        down_bias_O=ffn.down_bias_O,
    )
