"""Add methods to those that a recipe may name: `upcycle.register_expert_method` and `_router`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from upcycle.errors import UsageError
from upcycle.ir.ffn import FFN
from upcycle.layers.config import OTHER_KINDS
from upcycle.layers.router import Router
from upcycle.layers.routers import ROUTER_KINDS
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import ExpertMethod, MethodKind, Need
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod
from upcycle.recipe import schema as recipe
from upcycle.recipe.methods import Options
from upcycle.recipe.schema import Recipe


def register_expert_method(
    name: str,
    build: Any = None,
    *,
    kind: MethodKind,
    needs: Need | None = None,
    refuse: Callable[[FFN, Recipe], Iterable[str]] = lambda ffn, recipe: (),
    options: Options | None = None,
) -> Any:
    """Let recipes say ``experts.method: name``; also a decorator of `build`, which it returns.

    Args:
        name: a word that is not taken.
        build: from a `DenseLayer` to its `Parts`: a pure function of weights, so what it makes can
            be written as every target.
        kind: what holds of the experts: ``copies``, ``split``, ..., as `ExpertMethod` says.
        needs: what calibration has to show, ``activations`` or ``gradients``, if anything.
        refuse: why it cannot make of one FFN what a recipe asks for, a sentence for each reason.
        options: what checks ``experts.options``, a pydantic model or a dataclass.

    Raises:
        UsageError: the name is taken, or a fact is none.
    """
    if build is None:
        return lambda given: register_expert_method(
            name, given, kind=kind, needs=needs, refuse=refuse, options=options
        )
    _one_of("kind", kind, get_args(MethodKind))
    _one_of("needs", needs, (None, *get_args(Need)))
    method = ExpertMethod(name, kind, build, needs=needs, refuse=refuse, options=options)
    EXPERTS.register(name, method, build)
    return build


def register_router(
    name: str,
    build: Any = None,
    *,
    makes: str | type[Router] = "linear",
    kinds: Iterable[MethodKind] = ALL_KINDS,
    otherwise: str = "does not fit these experts; choose another `experts.method`",
    needs: Need | None = None,
    bias: bool = False,
    facts: Callable[[recipe.Router, FFN, int], Mapping[str, Any]] = lambda router, ffn, count: {},
    options: Options | None = None,
) -> Any:
    """Let recipes say ``router.method: name``; also a decorator of `build`, which it returns.

    Args:
        name: a word that is not taken.
        build: from a `DenseLayer` and its `Parts` to the tensors of the router by name; of a linear
            one the rows [E, D] are enough.
        makes: a kind of router that there is, or a class, whose `make` and `scores` say how it
            scores. ``onnx_scores``, if it has that, takes the place of `scores` in ONNX files, and
            a self-contained modeling file gets the text of its module, if that is plain.
        kinds: the kinds of experts that it makes sense for.
        otherwise: why it does not for the others, to end the sentence "<name> ...".
        needs: what calibration has to show, if anything.
        bias: it makes a bias that is not zero.
        facts: for a class, what its ``config.options`` holds, plain data.
        options: what checks ``router.options``, a pydantic model or a dataclass.

    Raises:
        UsageError: the name is taken, or a fact is none.
    """
    if build is None:
        return lambda given: register_router(
            name,
            given,
            makes=makes,
            kinds=kinds,
            otherwise=otherwise,
            needs=needs,
            bias=bias,
            facts=facts,
            options=options,
        )
    _one_of("needs", needs, (None, *get_args(Need)))
    for kind in kinds:
        _one_of("kinds", kind, get_args(MethodKind))
    if isinstance(makes, str):
        _one_of("makes", makes, tuple(ROUTER_KINDS))
    elif not issubclass(makes, Router):
        raise UsageError(f"`makes={makes.__name__}`: a router is a subclass of upcycle's `Router`")
    is_class = not isinstance(makes, str)
    method = RouterMethod(
        name,
        build,
        kinds=frozenset(kinds),
        otherwise=otherwise,
        needs=needs,
        bias=bias,
        makes=name if is_class else str(makes),
        facts=(lambda *given: {"options": dict(facts(*given))}) if is_class else facts,
        options=options,
    )
    ROUTER_METHODS.register(name, method, build)
    if is_class:
        OTHER_KINDS[name] = makes
    return build


def _one_of(argument: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise UsageError(f"`{argument}={value}`: unknown; choose from {', '.join(map(str, known))}")
