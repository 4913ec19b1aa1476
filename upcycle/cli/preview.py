"""What would be found and decided for a named model, from its configuration alone.

It imports nothing that writes or verifies, so that it answers at once.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from upcycle.ir.ffn import Located
from upcycle.ir.measured import Costs
from upcycle.ir.spec import Plan
from upcycle.models.dense import Source
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.costs import costs, model_size
from upcycle.passes.plan.model_problems import check_model
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.schema import Recipe
from upcycle.targets.destination import Destination, destination, onnx_destination

if TYPE_CHECKING:
    from upcycle.models.onnx_file import OnnxSource


def inspect_model(source: "Source | OnnxSource") -> Located:
    """The FFNs and misses of a named model; no weight is read where a configuration is enough."""
    if not isinstance(source, Source):
        return source.found.located
    return locate_in(source.skeleton(), source.example)


def plan_model(
    source: "Source | OnnxSource",
    recipe: Recipe,
    recipe_name: str,
    *,
    runtimes: Sequence[str] = (),
    architecture: str | None = None,
) -> tuple[Plan, Costs, Destination]:
    """What a conversion would do, cost and write, from the configuration alone.

    Raises:
        UnsupportedError: no checkpoint is what `runtimes` and `architecture` require.
    """
    return planner(source, runtimes=runtimes, architecture=architecture)(recipe, recipe_name)


def planner(
    source: "Source | OnnxSource",
    *,
    runtimes: Sequence[str] = (),
    architecture: str | None = None,
) -> Callable[[Recipe, str], tuple[Plan, Costs, Destination]]:
    """`plan_model` for several recipes: the model is captured once."""
    if not isinstance(source, Source):
        file = source

        def plan_file(recipe: Recipe, recipe_name: str) -> tuple[Plan, Costs, Destination]:
            plan = file.plan(recipe, recipe_name).requiring(runtimes, architecture)
            return plan, costs(plan, *file.size), onnx_destination(plan)

        return plan_file
    skeleton = source.skeleton()
    located = locate_in(skeleton, source.example)
    source.unread(skeleton)

    def plan(recipe: Recipe, recipe_name: str) -> tuple[Plan, Costs, Destination]:
        made = make_plan(located, recipe, recipe_name=recipe_name)
        made = made.requiring(runtimes, architecture)
        check_model(skeleton, made)
        return made, costs(made, *model_size(skeleton)), destination(skeleton, made)

    return plan
