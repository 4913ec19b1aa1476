"""Decide which FFNs become MoE layers, and which; refuse what cannot work before reading weights.

The FFNs are chosen in this order: those of the wanted kinds; of them, those whose path fits
`include` and not `exclude`; without the first and last that are to be skipped; of the rest every
n-th (the n-th, the 2n-th, ..., as transformers counts ``decoder_sparse_step``; from `start` on).
"""

import hashlib
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from upcycle.errors import PlanError, UnsupportedError
from upcycle.ir.ffn import FFN, Located
from upcycle.ir.spec import MoESpec, Plan
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.granular import placement_is_exact
from upcycle.passes.experts.useful import NEEDS
from upcycle.passes.plan.promise import promise_of
from upcycle.passes.plan.router_problems import resolved, router_problems
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.recipe import schema as recipe
from upcycle.recipe.schema import Recipe

HAS_SHARED = ("split", "subsets")  # kinds whose experts are sets of neurons of one FFN


def make_plan(located: Located, recipe: Recipe, *, recipe_name: str = "custom") -> Plan:
    """Decide what each FFN becomes.

    Args:
        located: everything that was found in the model.
        recipe: what is asked for.
        recipe_name: how to call it in reports.

    Returns:
        One spec for each chosen FFN, in the order in which the model runs them. No tensors.

    Raises:
        UnsupportedError: there is no FFN to convert.
        PlanError: the recipe does not fit; the message has a line for each problem, with the FFNs
            that have it.
    """
    chosen = select_sites(located, recipe.layers)
    problems: dict[str, list[str]] = {}
    for ffn in chosen:
        for problem in _problems(ffn, recipe):
            problems.setdefault(problem, []).append(ffn.path)
    if problems:
        (problem, paths), *rest = problems.items()
        lines = [problem, *(f"{_few(paths)}: {problem}" for problem, paths in rest)]
        raise PlanError("\n".join(lines), site=_few(paths))
    specs = tuple(_spec(ffn, recipe, layer=located.ffns.index(ffn)) for ffn in chosen)
    return Plan(located=located, specs=specs, recipe=recipe, recipe_name=recipe_name)


def select_sites(located: Located, layers: recipe.Layers) -> list[FFN]:
    """The FFNs that `layers` names, in order; raises UnsupportedError if there are none."""
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
    first, last = (_how_many(n, len(named)) for n in (layers.skip_first, layers.skip_last))
    chosen = named[first : len(named) - last if last < len(named) else 0][
        (layers.start or layers.every) - 1 :: layers.every
    ]
    if not chosen:
        raise UnsupportedError(
            f"the recipe's `layers` leave none of the {len(ffns)} FFNs to convert: {len(named)} "
            f"fit `include` and `exclude`, {first} are skipped at the start and {last} at the end, "
            f"`every` is {layers.every} and `start` {layers.start or layers.every}; "
            f"the paths are {_few([ffn.path for ffn in ffns])}"
        )
    return chosen


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _how_many(number: float, total: int) -> int:
    """A count as it is, a fraction of `total` rounded down; 0.29 of 100 is 29."""
    return number if isinstance(number, int) else math.floor(number * total + 1e-9)


def _few(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"


def _num_experts(experts: recipe.Experts) -> int:
    """Routed experts of the layer."""
    if experts.method == "granular":
        return experts.count * experts.granularity
    return experts.count - (experts.shared if isinstance(experts.shared, int) else 0)


def _shared(ffn: FFN, experts: recipe.Experts) -> int:
    """Neurons of the shared expert."""
    kind = EXPERTS[experts.method].kind
    if kind == "residual" or (kind == "copies" and experts.shared):
        return ffn.d_ff
    part = experts.shared / (experts.count if isinstance(experts.shared, int) else 1)
    return round(ffn.d_ff * part)


def _width(ffn: FFN, experts: recipe.Experts, *, shared: int) -> int:
    """Neurons of one routed expert."""
    kind = EXPERTS[experts.method].kind
    if kind in ("slices", "residual"):
        return -(-ffn.d_ff // experts.granularity)
    if kind not in HAS_SHARED:
        return ffn.d_ff
    if experts.width is not None:
        return min(max(round(ffn.d_ff * experts.width), 1), ffn.d_ff - shared)
    return -(-(ffn.d_ff - shared) // _num_experts(experts))


def _spec(ffn: FFN, recipe: Recipe, *, layer: int) -> MoESpec:
    """The decision for one FFN, which has no problems."""
    experts, router = recipe.experts, resolved(recipe.router)
    num_experts = _num_experts(experts)
    shared = _shared(ffn, experts)
    top_k = num_experts if router.top_k == "all" else router.top_k
    scale = num_experts / top_k if router.scale == "n_over_k" else router.scale
    return MoESpec(
        ffn=ffn,
        experts=experts,
        router=router,
        compensate=recipe.compensate,
        num_experts=num_experts,
        width=_width(ffn, experts, shared=shared),
        shared=shared,
        top_k=top_k,
        scale=scale,
        promise=promise_of(
            recipe, ffn.pointwise, num_experts=num_experts, top_k=top_k, scale=scale
        ),
        seed=_seed(recipe.seed, layer),
    )


def _seed(seed: int, layer: int) -> int:
    """31 bits that differ from layer to layer; neighbouring recipe seeds share no layer's draws."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return (int.from_bytes(digest[:4], "big") + layer) % 2**31


def _problems(ffn: FFN, recipe: Recipe) -> list[str]:
    """Everything that keeps one FFN from becoming the layer that the recipe asks for."""
    experts, router = recipe.experts, recipe.router
    method, gate = EXPERTS[experts.method], ROUTER_METHODS[router.method]
    kind = method.kind
    if experts.shared and kind == "copies" and experts.shared != 1:
        return ["one copy can be permanent; set `experts.shared: 1`, or leave it out"]
    if experts.shared and kind not in (*HAS_SHARED, "copies"):
        return [
            f"`experts.method: {experts.method}` makes no shared expert; leave `experts.shared` out"
        ]
    if experts.shared >= experts.count:
        return [
            f"{experts.shared} of {experts.count} experts cannot be shared; "
            f"set `experts.shared` below {experts.count}"
        ]
    num_experts = _num_experts(experts)
    top_k = num_experts if router.top_k == "all" else router.top_k
    most = num_experts + (router.nulls if router.select == "null" else 0)
    problems = []
    if experts.width is not None and kind != "subsets":
        problems.append(
            f"`experts.method: {experts.method}` decides itself how wide an expert is; leave "
            "`experts.width` out"
        )
    can_adapt = kind == "split" and experts.shared and experts.shared_by in NEEDS
    if experts.adaptive and not can_adapt and experts.width is None:
        problems.append(
            "`experts.adaptive` divides the shared neurons of a split among the layers, by what "
            "calibration shows; set `experts.shared`, and `experts.shared_by` to "
            f"{', '.join(NEEDS)}; or the neurons of the experts: set `experts.width`"
        )
    if recipe.compensate.any and kind not in HAS_SHARED:
        problems.append(
            f"`experts.method: {experts.method}` drops no neurons; leave `compensate` out"
        )
    if kind in HAS_SHARED and _shared(ffn, experts) >= ffn.d_ff:
        problems.append(
            f"a shared expert of all {ffn.d_ff} neurons leaves none for the others; "
            "set `experts.shared` lower"
        )
    rank, most_rank = recipe.compensate.low_rank, min(ffn.d_model, ffn.d_out)
    if rank > most_rank:
        problems.append(
            f"a linear map from {ffn.d_model} to {ffn.d_out} has no rank of {rank}; "
            f"set `compensate.low_rank` to {most_rank} or less"
        )
    if top_k > most:
        problems.append(
            f"a token cannot visit {top_k} of {most} experts; set `router.top_k` to {most} or less"
        )
    if kind == "split" and experts.count > ffn.d_ff:
        problems.append(
            f"{experts.count} experts cannot share {ffn.d_ff} neurons; "
            f"set `experts.count` to {ffn.d_ff} or less"
        )
    if kind == "slices":
        problems += _granular_problems(ffn, experts, top_k)
    if kind == "residual" and experts.granularity > ffn.d_ff:
        problems.append(
            f"{ffn.d_ff} neurons cannot be cut into {experts.granularity} slices; "
            f"set `experts.granularity` to {ffn.d_ff} or less"
        )
    problems += _source_problems(experts)
    if kind not in gate.kinds and not (kind == "copies" and num_experts == 1):
        problems.append(f"`router.method: {router.method}` {gate.otherwise}")
    problems += router_problems(router)
    if router.tied and router.select == "null":
        problems.append("a tied router has no rows for null experts; leave `router.tied` out")
    return problems


def _source_problems(experts: recipe.Experts) -> list[str]:
    """What is wrong with the models that experts are taken from; the same for every FFN."""
    count = len(experts.sources)
    if experts.method != "from_checkpoints":
        return (
            [f"`experts.method: {experts.method}` has no sources; set it to from_checkpoints"]
            if count
            else []
        )
    if not count:
        return ["there are no models to take experts from; set `experts.sources: [base, ...]`"]
    problems = []
    if experts.count % count:
        problems.append(
            f"{count} sources cannot give {experts.count} experts, the same number each; "
            f"set `experts.count` to {count}"
        )
    if isinstance(experts.merge, int) and not 0 <= experts.merge < count:
        problems.append(
            f"there is no source {experts.merge}; set `experts.merge` to a number below {count}"
        )
    return problems


def _granular_problems(ffn: FFN, experts: recipe.Experts, top_k: int) -> list[str]:
    slices = experts.granularity
    problems = []
    if ffn.d_ff % slices:
        divisors = [n for n in range(1, ffn.d_ff + 1) if ffn.d_ff % n == 0]
        below = max(n for n in divisors if n < slices) if slices > 1 else 1
        above = min((n for n in divisors if n > slices), default=below)
        choice = f"{below}" if above == below else f"{below} or {above}"
        problems.append(
            f"{ffn.d_ff} neurons cannot be cut into {slices} equal slices; "
            f"set `experts.granularity` to {choice}"
        )
    if top_k % slices:
        problems.append(
            f"a token that visits {top_k} experts gets no whole number of copies, "
            f"which have {slices} slices each; set `router.top_k` to a multiple of {slices}"
        )
    if experts.scale == "up_down" and not placement_is_exact("up_down", ffn.pointwise):
        problems.append(
            f"`experts.scale: up_down` changes what {ffn.pointwise.name} computes, since no "
            "expansion enters it linearly; set `experts.scale: down`"
        )
    return problems
