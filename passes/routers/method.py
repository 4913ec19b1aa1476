"""What a gate method is: a function from a dense FFN and its experts to the tensors of a router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, get_args

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import MethodKind, Need, Parts

ALL_KINDS: Final[frozenset[MethodKind]] = frozenset(get_args(MethodKind))


class BuildRouter(Protocol):
    """Makes a router: a pure function of weights, decision, random draws and activations."""

    def __call__(
        self,
        ffn: FFNWeights,
        parts: Parts,
        spec: MoESpec,
        *,
        generator: torch.Generator,
        data: FFNInputs | None,
    ) -> Mapping[str, torch.Tensor]:
        """Build the router of one layer: its tensors by their names in the runtime router.

        `generator` makes every random draw; `data` is what the FFN was given in calibration, where
        the method needs it or it was run for another reason.
        """
        ...


@dataclass(frozen=True)
class RouterMethod:
    """One way to make a router.

    Attributes:
        name: the word in a recipe.
        build: the method.
        kinds: the kinds of experts that it makes sense for.
        otherwise: why it does not for the others, to end the sentence "<name> ...".
        paper: where it was published.
        source: address of the paper.
        needs: what it has to be shown: ``activations``, ``gradients``.
        bias: it makes a bias that is not zero, which is on unless the recipe says otherwise.
    """

    name: str
    build: BuildRouter
    kinds: frozenset[MethodKind]
    otherwise: str
    paper: str
    source: str
    needs: frozenset[Need] = frozenset()
    bias: bool = False


def linear(
    weight_ED: torch.Tensor, spec: MoESpec, bias_E: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a linear router, with a bias, of zeros if not given, if the recipe wants one.

    Null experts start as copies of the true rows, in turn
    (Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233).
    """
    if bias_E is None:
        bias_E = weight_ED.new_zeros(len(weight_ED))
    copies = torch.arange(spec.router_config()["nulls"]) % len(weight_ED)
    tensors = {"weight": torch.cat([weight_ED, weight_ED[copies]]).float()}
    if spec.router.bias:
        tensors["bias"] = torch.cat([bias_E, bias_E[copies]]).float()
    return tensors
