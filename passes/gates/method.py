"""What a gate method is: a function from a dense FFN and its experts to a linear router."""

from dataclasses import dataclass
from typing import Protocol

import torch

from upcycle.passes.experts.method import Kind
from upcycle.spec import MoESpec
from upcycle.weights import ExpertWeights, FFNWeights, RouterWeights


class BuildRouter(Protocol):
    """Makes a router: a pure function of weights, decision and random draws; float32."""

    def __call__(
        self,
        ffn: FFNWeights,
        experts: ExpertWeights,
        spec: MoESpec,
        *,
        generator: torch.Generator,
    ) -> RouterWeights:
        """Build the router of one layer; `generator` makes every random draw."""
        ...


@dataclass(frozen=True)
class GateMethod:
    """One way to make a router.

    Attributes:
        name: the word in a recipe.
        build: the method.
        kinds: the kinds of experts that it makes sense for.
        needs: what `kinds` means, to end the sentence "<name> ...".
        paper: where it was published.
        source: address of the paper.
    """

    name: str
    build: BuildRouter
    kinds: frozenset[Kind]
    needs: str
    paper: str
    source: str


def zero_bias(spec: MoESpec) -> torch.Tensor | None:
    """The bias that a new router starts with, [E] float32, or None if the recipe wants none."""
    return torch.zeros(spec.num_experts) if spec.router.bias else None
