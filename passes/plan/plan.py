"""Decide which FFNs become which MoE layers; refuse what cannot work before reading weights.

The FFNs are filtered in this order: the wanted kinds (heads, where a recipe names no kind and the
model has nothing else); a path that fits `include` and not `exclude`; not among the first and last
of its stack that are to be skipped; every n-th of the rest of the stack (the n-th, the 2n-th, ...,
as transformers counts ``decoder_sparse_step``; from `start` on). FFNs whose paths differ in numbers
alone are a stack: the layers of an encoder, those of a decoder.
"""

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from upcycle.errors import PlanError, RecipeError, UnsupportedError
from upcycle.ir.ffn import FFN, SHARES, Located
from upcycle.ir.spec import MoESpec, Plan
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.kinds import (
    kind_problems,
    neurons_of_expert,
    routed_experts,
    shared_neurons,
    sharing_problem,
)
from upcycle.passes.experts.method import Need
from upcycle.passes.experts.useful import NEEDS
from upcycle.passes.plan.promise import promise_of
from upcycle.passes.plan.router_problems import resolved, router_problems
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.recipe import schema as recipe
from upcycle.recipe.schema import Recipe

log = logging.getLogger(__name__)


def make_plan(located: Located, recipe: Recipe, *, recipe_name: str = "custom") -> Plan:
    """Decide what each FFN becomes.

    Returns:
        One spec for each chosen FFN, in the order in which the model runs them, without tensors.
        Reports call the recipe `recipe_name`.

    Raises:
        UnsupportedError: there is no FFN to convert.
        RecipeError: its `layers` leave none.
        PlanError: the recipe does not fit; the message has a line for each problem, with the FFNs
            that have it.
    """
    layers = with_kinds(located, recipe.layers)
    recipe = recipe.model_copy(update={"layers": layers})
    chosen = select_sites(located, layers)
    problems: dict[str, list[str]] = {}
    for ffn in chosen:
        for problem in _problems(ffn, recipe):
            problems.setdefault(problem, []).append(ffn.path)
    if problems:
        (problem, paths), *rest = problems.items()
        lines = [problem, *(f"{_few(paths)}: {problem}" for problem, paths in rest)]
        raise PlanError("\n".join(lines), site=_few(paths))
    specs = tuple(_spec(ffn, recipe, layer=located.ffns.index(ffn)) for ffn in chosen)
    for spec in specs:
        made = (spec.num_experts, spec.width, spec.top_k, spec.promise)
        log.debug("%s becomes %d experts of %d, top_k %d: %s", spec.ffn.path, *made)
    return Plan(located=located, specs=specs, recipe=recipe, recipe_name=recipe_name)


def with_kinds(located: Located, layers: recipe.Layers) -> recipe.Layers:
    """`layers` with the kind ``head`` if it names none and a plain MLP is all that there is.

    A model whose real FFNs were refused is none: its pooler is not what was meant.
    """
    kinds = {ffn.kind for ffn in located.ffns}
    refused = any(not miss.reason.startswith(SHARES) for miss in located.misses)
    if "kinds" in layers.model_fields_set or "ffn" in kinds or "head" not in kinds or refused:
        return layers
    return layers.model_copy(update={"kinds": ("head",)})


def select_sites(located: Located, layers: recipe.Layers) -> list[FFN]:
    """The FFNs that `layers` names, in order; raises as `make_plan` if there are none."""
    ffns = [ffn for ffn in located.ffns if ffn.kind in layers.kinds]
    if not ffns:
        others = [
            f"{ffn.path or 'the model itself'}: a {ffn.kind}; to convert it, set "
            f"`layers.kinds: [{', '.join(dict.fromkeys((*layers.kinds, ffn.kind)))}]`"
            for ffn in located.ffns
        ]
        reasons = others + [f"{miss.path}: {miss.reason}" for miss in located.misses]
        near = "".join(f"\n  {reason}" for reason in reasons) or " and nothing looks like one"
        raise UnsupportedError(f"the model has no dense FFN to convert{near}")
    include = (layers.include,) if isinstance(layers.include, str) else layers.include
    named = [
        ffn for ffn in ffns if _fits(ffn.path, include) and not _fits(ffn.path, layers.exclude)
    ]
    stacks: dict[str, list[FFN]] = {}
    for ffn in named:
        stacks.setdefault(re.sub(r"\d+", "*", ffn.path), []).append(ffn)
    places = {ffn.path for stack in stacks.values() for ffn in _of_stack(stack, layers)}
    if not places:
        raise RecipeError(
            f"the recipe's `layers` leave none of the {len(ffns)} FFNs to convert: {len(named)} "
            f"fit `include` and `exclude`, of each of {len(stacks)} stacks `skip_first` leaves out "
            f"{layers.skip_first} at the start and `skip_last` {layers.skip_last} at the end, "
            f"`every` is {layers.every} and `start` {layers.start or layers.every}; "
            f"the paths are {_few([ffn.path for ffn in ffns])}"
        )
    return [ffn for ffn in named if ffn.path in places]


def _of_stack(stack: Sequence[FFN], layers: recipe.Layers) -> Sequence[FFN]:
    first, last = (_how_many(n, len(stack)) for n in (layers.skip_first, layers.skip_last))
    rest = stack[first : max(len(stack) - last, 0)]
    return rest[(layers.start or layers.every) - 1 :: layers.every]


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _how_many(number: float, total: int) -> int:
    """A count as it is, a fraction of `total` rounded down; 0.29 of 100 is 29."""
    return number if isinstance(number, int) else math.floor(number * total + 1e-9)


def _few(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"


def _spec(ffn: FFN, recipe: Recipe, *, layer: int) -> MoESpec:
    """The decision for one FFN, which has no problems."""
    experts, router = recipe.experts, resolved(recipe.router)
    method, router_method = EXPERTS[experts.method], ROUTER_METHODS[router.method]
    num_experts = routed_experts(method, experts)
    shared = shared_neurons(method, ffn, experts)
    top_k = num_experts if router.top_k == "all" else router.top_k
    scale = num_experts / top_k if router.scale == "n_over_k" else router.scale
    return MoESpec(
        ffn=ffn,
        experts=experts,
        router=router,
        compensate=recipe.compensate,
        num_experts=num_experts,
        width=neurons_of_expert(method, ffn, experts),
        shared=shared,
        top_k=top_k,
        scale=scale,
        promise=promise_of(
            recipe, ffn.pointwise, num_experts=num_experts, top_k=top_k, scale=scale
        ),
        seed=_seed(recipe.seed, layer),
        router_kind=router_method.makes,
        router_facts=dict(router_method.facts(router, ffn, num_experts)),
        expert_bias=method.makes_whole_ffns and ffn.contraction.bias is not None,
    )


def _seed(seed: int, layer: int) -> int:
    """31 bits that differ from layer to layer; neighbouring recipe seeds share no layer's draws."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return (int.from_bytes(digest[:4], "big") + layer) % 2**31


def _problems(ffn: FFN, recipe: Recipe) -> list[str]:
    """Everything that keeps one FFN from becoming the layer that the recipe asks for."""
    experts, router = recipe.experts, recipe.router
    method, router_method = EXPERTS[experts.method], ROUTER_METHODS[router.method]
    if problem := sharing_problem(method, experts):
        return [problem]  # the number of experts follows from it, and the rest from that
    num_experts = routed_experts(method, experts)
    problems = list(kind_problems(method, ffn, recipe))
    rank, most_rank = recipe.compensate.low_rank, min(ffn.d_model, ffn.d_out)
    if rank > most_rank:
        problems.append(
            f"a linear map from {ffn.d_model} to {ffn.d_out} has no rank of {rank}; "
            f"set `compensate.low_rank` to {most_rank} or less"
        )
    top_k = num_experts if router.top_k == "all" else router.top_k
    most = num_experts + (router.nulls if router.select == "null" else 0)
    if top_k > most:
        problems.append(
            f"a token cannot visit {top_k} of {most} experts; set `router.top_k` to {most} or less"
        )
    problems += method.refuse(ffn, recipe)
    is_one_copy = method.kind == "copies" and num_experts == 1
    if method.kind not in router_method.kinds and not is_one_copy:
        problems.append(f"`router.method: {router.method}` {router_method.otherwise}")
    return [*problems, *router_problems(router)]


def needs(recipe: Recipe) -> frozenset[Need]:
    """What calibration has to show before `recipe` can be carried out.

    ``activations``: what each FFN is given; ``gradients``: of a loss, too.
    """
    experts = recipe.experts
    wanted = {EXPERTS[experts.method].needs, ROUTER_METHODS[recipe.router.method].needs}
    if experts.adaptive and experts.width is not None:
        wanted.add("gradients")
    if experts.shared:
        wanted.add(NEEDS.get(experts.shared_by))
    if recipe.compensate.any or any(wanted):
        wanted.add("activations")
    return frozenset(need for need in wanted if need is not None)
