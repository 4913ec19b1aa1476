"""The weights of one MoE layer, into the module and out of it."""

import torch

from upcycle.errors import UsageError
from upcycle.ir.weights import ExpertWeights, MoEWeights, Provenance
from upcycle.layers.config import LayerConfig
from upcycle.layers.experts import SharedExpert
from upcycle.layers.moe import MoE


@torch.no_grad()
def load_weights(layer: MoE, weights: MoEWeights) -> None:
    """Copy the weights into the runtime layer, in the dtype and on the device of the layer.

    Raises:
        UsageError: the layer was made for another shape, or has a tensor that the weights lack.
    """
    held, given = layer.state_dict(), weights.tensors()
    held.pop("kept_weight", None)  # not of the layer: `upcycle.layers.tap` says what it is
    for name in dict.fromkeys([*held, *given]):
        shapes = [tuple(t[name].shape) if name in t else None for t in (held, given)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{name} is {shapes[0]} in the layer and {shapes[1]} in the weights; "
                "make the layer from the `layer_config()` of the spec that made the weights"
            )
        held[name].copy_(given[name])


def empty_layer(config: LayerConfig) -> MoE:
    """The layer on the meta device, in eval mode: names and shapes without numbers."""
    with torch.device("meta"):
        return MoE(config).eval()


def layer_around(config: LayerConfig, weights: MoEWeights) -> MoE:
    """The layer that holds `weights` themselves, in their dtypes: nothing is copied."""
    layer = empty_layer(config)
    layer.load_state_dict(weights.tensors(), assign=True)
    return layer


def layer_tensors(layer: MoE, weights: MoEWeights) -> dict[str, torch.Tensor]:
    """The weights of a layer under their names in it, in its dtypes."""
    held = layer.state_dict()
    return {name: tensor.to(held[name].dtype) for name, tensor in weights.tensors().items()}


def weights_of(layer: MoE, provenance: Provenance | None = None) -> MoEWeights:
    """The tensors of a layer, as they are now and without a copy.

    Without `provenance` the dense neuron behind each neuron is unknown (-1).
    """
    experts, bias_EG = layer.experts, layer.experts.up_bias_EG
    thin = None if layer.low_rank is None else list(layer.low_rank.parameters())
    shape = (experts.num_experts, experts.intermediate_dim)
    return MoEWeights(
        experts=ExpertWeights(
            up_EGD=experts.up_EGD.detach(),
            up_bias_EG=None if bias_EG is None else bias_EG.detach(),
            down_EOI=experts.down_proj.detach(),
            neuron_EI=torch.full(shape, -1) if provenance is None else provenance.expert_EI,
        ),
        router={name: tensor.detach() for name, tensor in layer.router.state_dict().items()},
        output_bias_O=None if layer.output_bias is None else layer.output_bias.detach(),
        shared=_shared_weights(layer.shared_expert, provenance),
        low_rank=None if thin is None else (thin[0].detach(), thin[1].detach()),
    )


def _shared_weights(
    shared: SharedExpert | None, provenance: Provenance | None
) -> ExpertWeights | None:
    if shared is None:
        return None
    up, down = shared.up, shared.down_proj.weight.detach()
    width = down.shape[1]
    neuron_S = torch.full((width,), -1) if provenance is None else provenance.shared_S
    return ExpertWeights(
        up_EGD=up.weight.detach()[None],
        up_bias_EG=None if up.bias is None else up.bias.detach()[None],
        down_EOI=down[None],
        neuron_EI=neuron_S[None],
    )
