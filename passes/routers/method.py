"""What a router method is: from a dense FFN and its experts to the tensors of a router."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, get_args

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.layers.config import RouterKind
from upcycle.passes.experts.method import MethodKind, Need, Parts
from upcycle.recipe.schema import Router, RouterMethodName

ALL_KINDS: Final[frozenset[MethodKind]] = frozenset(get_args(MethodKind))

Limit = Callable[[Router], str | None]  # why a method cannot do what the `router` section says


def no_nulls(router: Router) -> str | None:
    """The limit of routers that have no rows for experts that do nothing."""
    if router.select != "null":
        return None
    return f"`method: {router.method}` scores no null experts; use a linear router"


def no_bias(router: Router) -> str | None:
    """The limit of routers without a bias."""
    if not router.bias:
        return None
    return f"a router of `method: {router.method}` has no bias; leave `router.bias` out"


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
        makes: the kind of the runtime router, a key of `upcycle.layers.routers.ROUTER_KINDS`.
        facts: router section, FFN and number of experts -> what it sets in the configuration of
            that router, besides what follows from the recipe for all methods.
        reads: fields of the router section that are of no use with most methods.
        limits: what it cannot do, whatever the FFN is.
    """

    name: RouterMethodName
    build: BuildRouter
    kinds: frozenset[MethodKind]
    otherwise: str
    paper: str
    source: str
    needs: frozenset[Need] = frozenset()
    bias: bool = False
    makes: RouterKind = "linear"
    facts: Callable[[Router, FFN, int], Mapping[str, Any]] = lambda router, ffn, num_experts: {}
    reads: frozenset[str] = frozenset()
    limits: tuple[Limit, ...] = ()


def linear(
    weight_ED: torch.Tensor, spec: MoESpec, bias_E: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a linear router, with a bias, of zeros if not given, if the recipe wants one.

    Null experts start as copies of the true rows, in turn
    (Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233).
    """
    if bias_E is None:
        bias_E = weight_ED.new_zeros(len(weight_ED))
    copies = torch.arange(spec.router_config().nulls) % len(weight_ED)
    tensors = {"weight": torch.cat([weight_ED, weight_ED[copies]]).float()}
    if spec.router.bias:
        tensors["bias"] = torch.cat([bias_E, bias_E[copies]]).float()
    return tensors
