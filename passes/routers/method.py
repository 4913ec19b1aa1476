"""What a router method is: from a dense FFN and its experts to the tensors of a router."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.spec import MoESpec
from upcycle.passes.experts.method import DenseLayer, MethodKind, Need, Parts
from upcycle.recipe.methods import Options
from upcycle.recipe.schema import Router

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


BuildRouter = Callable[[DenseLayer, Parts], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class RouterMethod:
    """One way to make a router.

    Attributes:
        name: the word in a recipe.
        build: the method, whose tensors have their names in the runtime router; its docstring
            names the paper.
        kinds: the kinds of experts that it makes sense for.
        otherwise: why it does not for the others, to end the sentence "<name> ...".
        needs: what calibration has to show, if anything.
        bias: it makes a bias that is not zero, which is on unless the recipe says otherwise.
        makes: the kind of the runtime router, a key of `upcycle.layers.routers.ROUTER_KINDS`.
        facts: router section, FFN and number of experts -> what it sets in the configuration of
            that router, besides what follows from the recipe for all methods.
        reads: fields of the router section that are of no use with most methods.
        limits: what it cannot do, whatever the FFN is.
        options: what checks ``router.options``, a pydantic model or a dataclass; an object of it is
            ``dense.spec.router.options``.
    """

    name: str
    build: BuildRouter
    kinds: frozenset[MethodKind] = ALL_KINDS
    otherwise: str = ""
    needs: Need | None = None
    bias: bool = False
    makes: str = "linear"
    facts: Callable[[Router, FFN, int], Mapping[str, Any]] = lambda router, ffn, num_experts: {}
    reads: frozenset[str] = frozenset()
    limits: tuple[Limit, ...] = ()
    options: Options | None = None


def as_router_method(name: str, given: Any) -> RouterMethod:
    """What stood in a recipe in the place of a name; a function makes a linear router."""
    return (
        replace(given, name=name) if isinstance(given, RouterMethod) else RouterMethod(name, given)
    )


def drawn_rows(dense: DenseLayer, count: int) -> torch.Tensor:
    """`count` rows from N(0, std^2), [count, D]; ``router.std`` is the standard deviation."""
    return dense.spec.router.std * torch.randn(count, dense.d_model, generator=dense.generator)


def linear(
    weight_ED: torch.Tensor, spec: MoESpec, bias_E: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a linear router: ``weight`` [E, D], ``bias`` [E] if ``router.bias``; float32.

    A bias that is not given is zero. Null experts start as copies of the true rows, in turn
    (Zeng et al., "AdaMoE", 2024, https://arxiv.org/abs/2406.13233).
    """
    if bias_E is None:
        bias_E = weight_ED.new_zeros(len(weight_ED))
    copies = torch.arange(spec.router_config().nulls) % len(weight_ED)
    tensors = {"weight": torch.cat([weight_ED, weight_ED[copies]]).float()}
    if spec.router.bias:
        tensors["bias"] = torch.cat([bias_E, bias_E[copies]]).float()
    return tensors
