"""What an expert method is: a function from a dense FFN to experts, and where it was published."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from upcycle.spec import MoESpec
from upcycle.weights import ExpertWeights, FFNWeights

Kind = Literal["copies", "slices", "split"]


class BuildExperts(Protocol):
    """Makes experts: a pure function of the dense weights, the decision and the random draws."""

    def __call__(
        self, ffn: FFNWeights, spec: MoESpec, *, generator: torch.Generator
    ) -> ExpertWeights:
        """Build the experts of one layer; `generator` makes every random draw."""
        ...


@dataclass(frozen=True)
class ExpertMethod:
    """One way to make experts.

    Attributes:
        name: the word in a recipe.
        kind: ``copies`` (each expert is the whole FFN), ``slices`` (each expert is a slice of a
            copy) or ``split`` (the experts share the neurons of one FFN, each neuron once). The
            promise of a plan and the gates that make sense follow from it.
        build: the method.
        paper: where it was published.
        source: address of the paper.
    """

    name: str
    kind: Kind
    build: BuildExperts
    paper: str
    source: str
