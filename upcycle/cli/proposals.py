"""Which recipes fit a goal on a model, and what each costs: for `upcycle init`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from upcycle.cli.preview import planner
from upcycle.cli.recipe_facts import recipe_facts
from upcycle.errors import UpcycleError, UsageError
from upcycle.ir.measured import Costs
from upcycle.ir.spec import Plan
from upcycle.models.dense import Source
from upcycle.page.measured import measured
from upcycle.recipe.reader import load_recipe
from upcycle.recipe.schema import Recipe
from upcycle.recipe.shipped import describe
from upcycle.targets.destination import Destination
from upcycle.util.wording import size

Planner = Callable[[Recipe, str], tuple[Plan, Costs, Destination]]
Goal = Literal["train", "faster", "smaller", "merge"]

# The recipes that are tried for a goal, in the order of advice; those of `faster` are the best of
# docs/quality.md, and then what needs no data. It is the 8-bit weights that save the bytes of
# `smaller`, so the first changes nothing else.
RECIPES: dict[Goal, tuple[str, ...]] = {
    "train": ("sparse-upcycling", "granular", "drop-upcycling"),
    "faster": ("upcycle", "expertweaver", "emoe"),
    "smaller": ("split-all", "upcycle", "emoe"),
    "merge": ("btx", "clip-moe"),
}
ROUNDED = ("onnx.weights=int8",)
ROUNDED_BYTES = 1 + 4 / 32  # of a weight: 8 bits, and a float scale for a group of them
COUNTS = (8, 4, 2)  # experts that are whole FFNs, if memory limits them
TRAINING: dict[Goal, str] = {
    "train": "all of it, with a balance loss for the router",
    "faster": "nothing must be; training brings quality back",
    "smaller": "nothing must be; training brings quality back",
    "merge": "the routers at least",
}


@dataclass(frozen=True)
class Proposal:
    """A recipe for a goal.

    Attributes:
        goal: what it is for.
        recipe: its name; `overrides` are changes of it.
        title: what it does.
        promise: of the plan.
        costs: of the whole model.
        bytes_rounded: about those of its weights in the ONNX file, where they are rounded.
        quality: what is known of it, in words.
        training: what has to be trained.
        needs: the data of the conversion.
        software: what runs the result.
    """

    goal: Goal
    recipe: str
    overrides: tuple[str, ...]
    title: str
    promise: str
    costs: Costs
    bytes_rounded: int | None
    quality: str
    training: str
    needs: str
    software: tuple[str, ...]


def propose(
    source: Any,
    goal: Goal,
    *,
    runtimes: Sequence[str] = (),
    memory: int | None = None,
    sources: Sequence[str] = (),
) -> tuple[list[Proposal], dict[str, str]]:
    """The recipes that reach `goal` on a named model, the first choice first.

    Args:
        source: as `open_model` returns it; no weight is read.
        runtimes: software that has to run the checkpoint.
        memory: bytes that the weights of the result may take.
        sources: for `merge`: the other models.

    Returns:
        The proposals, and for each recipe that does not fit the reason.

    Raises:
        UsageError: `merge` without other models.
    """
    if goal == "merge" and not sources:
        raise UsageError(
            "`goal=merge`: name the other models, of the same shape, or PEFT adapters of this one, "
            "with `sources`"
        )
    plan = planner(source, runtimes=runtimes)
    reads = isinstance(source, Source) and _writes_text(source)
    found, refused = [], {}
    for name in RECIPES[goal]:
        try:
            made = (
                _proposal(plan, goal, name, overrides, reads=reads)
                for overrides in _variants(goal, name, sources)
            )
            found.append(_fitting(made, memory))
        except UpcycleError as error:
            refused[name] = str(error)
    return found, refused


def _fitting(made: Iterator[Proposal], memory: int | None) -> Proposal:
    """The first that memory allows."""
    taken = 0
    for proposal in made:
        taken = proposal.bytes_rounded or proposal.costs.bytes_on_disk
        dense = proposal.costs.bytes_before
        if proposal.bytes_rounded is not None and taken >= dense:
            had = size(dense)
            raise UsageError(f"its rounded weights take {size(taken)}, the dense model's {had}")
        if memory is None or taken <= memory:
            return proposal
    raise UsageError(
        f"its weights take {size(taken)} at least, and {size(memory or 0)} are allowed"
    )


def _variants(goal: Goal, name: str, sources: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Overrides, those with the most experts first."""
    if goal == "merge":
        named = ["base", *sources]
        experts = (f"experts.sources=[{', '.join(named)}]", f"experts.count={len(named)}")
        chosen = load_recipe(name).router.top_k
        fits = not isinstance(chosen, int) or chosen <= len(named)
        yield experts if fits else (*experts, f"router.top_k={len(named)}")
    elif goal == "train":
        shipped = load_recipe(name).experts.count
        yield ()
        yield from ((f"experts.count={count}",) for count in COUNTS if count < shipped)
    else:
        yield ROUNDED if goal == "smaller" else ()


def _proposal(
    planned: Planner, goal: Goal, name: str, overrides: tuple[str, ...], *, reads: bool
) -> Proposal:
    recipe = load_recipe(name, overrides)
    plan, costs, written = planned(recipe, name)
    return Proposal(
        goal=goal,
        recipe=name,
        overrides=overrides,
        title=describe(name).title,
        promise=plan.promise,
        costs=costs,
        bytes_rounded=(
            round(costs.parameters_after * ROUNDED_BYTES) if goal == "smaller" else None
        ),
        quality=_quality(plan, reads=reads, rounded=goal == "smaller"),
        training="nothing" if goal == "smaller" and plan.promise == "exact" else TRAINING[goal],
        needs=recipe_facts(recipe).needs,
        software=tuple(n for n, support in written.runtimes.items() if support.level != "no"),
    )


def _quality(plan: Plan, *, reads: bool, rounded: bool) -> str:
    """What was measured of the recipe on other models, which write text or not."""
    if plan.promise == "exact":
        then = "but for the rounding of its weights" if rounded else "until it is trained"
        return f"equal to the dense model {then}"
    kind = measured()["perplexity" if reads else "cosine"]
    points = kind.points.get(plan.recipe_name)
    if not points:
        return "not measured without training"
    share = _active(plan)
    _, value = min(points, key=lambda point: abs(point[0] - share))
    if reads:
        return f"perplexity {value:.3g} times that of the dense model on {kind.model}"
    return (
        f"embeddings {value:.2f} alike (cosine) on {kind.model}, on text of the calibration's kind"
    )


def _active(plan: Plan) -> float:
    """The neurons that a token visits, over those of the converted FFNs."""
    visited = sum(spec.top_k * spec.width + spec.shared for spec in plan.specs)
    return visited / sum(spec.ffn.d_ff for spec in plan.specs)


def _writes_text(source: Source) -> bool:
    config: Any = getattr(source.skeleton(), "config", None)
    names = getattr(config, "architectures", None) or ()
    return any("CausalLM" in str(name) for name in names)
