"""The shipped recipes, by what one converts for."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType

from upcycle.cli.recipe_facts import GOALS, RecipeFacts
from upcycle.recipe.shipped import Description


def recipes_report(found: Sequence[tuple[Description, RecipeFacts]]) -> list[RenderableType]:
    """A paragraph for each recipe, under the goals."""
    return list(_lines(found))


def _lines(found: Sequence[tuple[Description, RecipeFacts]]) -> Iterator[str]:
    for goal, meaning in GOALS.items():
        of_goal = [(about, facts) for about, facts in found if facts.goal == goal]
        if of_goal:
            yield f"{goal.upper()}: {meaning}"
        for about, facts in of_goal:
            yield f"{about.name}\n  {about.title}"
            yield f"  {about.authors}, {about.paper}, {about.year}, {about.url}"
            yield f"  {facts.text()}"
        if of_goal:
            yield ""
