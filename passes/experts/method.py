"""What an expert method is: a function from a dense FFN to experts, and what holds of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, FFNWeights
from upcycle.recipe.methods import Options
from upcycle.recipe.schema import Recipe

MethodKind = Literal["copies", "altered", "slices", "residual", "split", "subsets"]
Need = Literal["activations", "gradients"]


@dataclass(frozen=True)
class DenseLayer:
    """All that a method reads of one layer; none of it may be changed.

    Attributes:
        ffn: the dense weights, in one float dtype, which the experts keep.
        spec: the decision: E is `num_experts`, and I, neurons of a routed expert, is `width`.
        generator: makes every random draw.
        calibration: what the FFN was given in calibration, if the model was run.
    """

    ffn: FFNWeights
    spec: MoESpec
    generator: torch.Generator
    calibration: FFNInputs | None = None

    @property
    def d_model(self) -> int:
        """D, the width of the input."""
        return self.ffn.up_MFD.shape[-1]

    @property
    def d_ff(self) -> int:
        """F, the number of neurons."""
        return self.ffn.up_MFD.shape[1]

    @property
    def data(self) -> FFNInputs:
        """The calibration tokens, for a method that `needs` them."""
        assert self.calibration is not None, "`passes.needs` asks for it"
        return self.calibration

    def of_neurons(self, neuron_F: torch.Tensor) -> "DenseLayer":
        """The layer without the neurons that are not in `neuron_F`, int64."""
        few = None if self.calibration is None else self.calibration.of_neurons(neuron_F)
        return replace(self, ffn=self.ffn.of_neurons(neuron_F), calibration=few)


@dataclass(frozen=True)
class Parts:
    """The experts of one layer, and its shared expert as a single expert, if it has one."""

    experts: ExpertWeights
    shared: ExpertWeights | None = None


BuildExperts = Callable[[DenseLayer], Parts]


@dataclass(frozen=True)
class ExpertMethod:
    """One way to make experts.

    Attributes:
        name: the word in a recipe.
        kind: what the promise of a plan and the choice of a router follow from: ``copies`` (each
            expert is the whole FFN), ``altered`` (the same, but changed), ``slices`` (each expert
            is a slice of a copy), ``residual`` (the FFN is the shared expert and the others add
            nothing yet), ``split`` (the experts share the neurons of one FFN, each neuron once) or
            ``subsets`` (the same, but neurons may be in several experts, or in none).
        build: the method; its docstring names the paper.
        needs: what calibration has to show, if anything.
        has_sources: it takes the experts from ``experts.sources``.
        refuse: why it cannot make of one FFN what a recipe asks for, a sentence for each reason;
            `upcycle.passes.experts.kinds` knows what no method of a kind can do.
        options: what checks ``experts.options``, a pydantic model or a dataclass; an object of it
            is ``dense.spec.experts.options``.
    """

    name: str
    kind: MethodKind
    build: BuildExperts
    needs: Need | None = None
    has_sources: bool = False
    refuse: Callable[[FFN, Recipe], Iterable[str]] = lambda ffn, recipe: ()
    options: Options | None = None

    @property
    def makes_whole_ffns(self) -> bool:
        """Whether each routed expert is an FFN for itself, with an output bias of its own."""
        return self.kind in ("copies", "altered", "residual")

    @property
    def deals_neurons(self) -> bool:
        """Whether its experts, shared ones too, are sets of neurons of one FFN."""
        return self.kind in ("split", "subsets")


def as_expert_method(name: str, given: Any) -> ExpertMethod:
    """What stood in a recipe in the place of a name; a function makes altered copies."""
    if isinstance(given, ExpertMethod):
        return replace(given, name=name)
    return ExpertMethod(name, "altered", given)
