"""The weights of one MoE layer, into the module and out of it."""

import torch

from upcycle.errors import UsageError
from upcycle.ir.weights import ExpertWeights, MoEWeights, Provenance
from upcycle.layers.config import LayerConfig
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
    held, up = layer.state_dict(), layer.experts.up_name
    down_EOI, shared = held["experts.down_proj"], None
    if provenance is None:
        unknown_EI = torch.full((len(down_EOI), down_EOI.shape[2]), -1)
        provenance = Provenance(unknown_EI, torch.full((layer.config.shared,), -1))
    if layer.shared_expert is not None:
        bias_G = held.get(f"shared_expert.{up}.bias")
        down_OS = held["shared_expert.down_proj.weight"]
        shared = ExpertWeights(
            up_EGD=held[f"shared_expert.{up}.weight"][None],
            up_bias_EG=None if bias_G is None else bias_G[None],
            down_EOI=down_OS[None],
            neuron_EI=provenance.shared_S[None],
        )
    experts = ExpertWeights(
        up_EGD=held[f"experts.{up}"],
        up_bias_EG=held.get(f"experts.{up}_bias"),
        down_EOI=down_EOI,
        neuron_EI=provenance.expert_EI,
        down_bias_EO=held.get("experts.down_proj_bias"),
    )
    has_low_rank = layer.low_rank is not None
    return MoEWeights(
        experts=experts,
        router=layer.router.state_dict(),
        output_bias_O=held.get("output_bias"),
        shared=shared,
        low_rank=(held["low_rank.0.weight"], held["low_rank.1.weight"]) if has_low_rank else None,
    )
