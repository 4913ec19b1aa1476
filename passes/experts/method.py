"""What an expert method is: a function from a dense FFN to experts, and where it was published."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, FFNWeights
from upcycle.recipe.schema import ExpertMethodName, Recipe

MethodKind = Literal["copies", "altered", "slices", "residual", "split", "subsets"]
Need = Literal["activations", "gradients"]


@dataclass(frozen=True)
class Parts:
    """The experts of one layer, and its shared expert as a single expert, if it has one."""

    experts: ExpertWeights
    shared: ExpertWeights | None = None


class BuildExperts(Protocol):
    """Makes experts: a pure function of dense weights, decision, random draws and activations."""

    def __call__(
        self,
        ffn: FFNWeights,
        spec: MoESpec,
        *,
        generator: torch.Generator,
        data: FFNInputs | None,
    ) -> Parts:
        """Build the experts of one layer.

        `generator` makes every random draw; `data` is what the FFN was given in calibration, where
        the method needs it or it was run for another reason.
        """
        ...


@dataclass(frozen=True)
class ExpertMethod:
    """One way to make experts.

    Attributes:
        name: the word in a recipe.
        kind: what the promise of a plan and the gates that make sense follow from: ``copies`` (each
            expert is the whole FFN), ``altered`` (the same, but changed), ``slices`` (each expert
            is a slice of a copy), ``residual`` (the FFN is the shared expert and the others add
            nothing yet), ``split`` (the experts share the neurons of one FFN, each neuron once) or
            ``subsets`` (the same, but neurons may be in several experts, or in none).
        build: the method.
        paper: where it was published.
        source: address of the paper.
        needs: what it has to be shown: ``activations``, ``gradients``.
        has_sources: it takes the experts from ``experts.sources``.
        refuse: why it cannot make of one FFN what a recipe asks for, a sentence for each reason;
            `upcycle.passes.experts.kinds` knows what no method of a kind can do.
    """

    name: ExpertMethodName
    kind: MethodKind
    build: BuildExperts
    paper: str
    source: str
    needs: frozenset[Need] = frozenset()
    has_sources: bool = False
    refuse: Callable[[FFN, Recipe], Iterable[str]] = lambda ffn, recipe: ()

    @property
    def deals_neurons(self) -> bool:
        """Whether its experts, shared ones too, are sets of neurons of one FFN."""
        return self.kind in ("split", "subsets")
