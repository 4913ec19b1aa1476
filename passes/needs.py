"""What a recipe has to be shown before it can be carried out."""

from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import Need
from upcycle.passes.gates import GATES
from upcycle.recipe import Recipe


def needs(recipe: Recipe) -> frozenset[Need]:
    """``activations``: what each FFN is given in calibration; ``gradients``: of a loss, too."""
    wanted = EXPERTS[recipe.experts.method].needs | GATES[recipe.router.method].needs
    if recipe.compensate.any or (
        recipe.experts.shared and recipe.experts.shared_by in ("rate", "contribution")
    ):
        wanted |= {"activations"}
    if recipe.experts.shared and recipe.experts.shared_by == "importance":
        wanted |= {"gradients"}
    return wanted | {"activations"} if wanted else wanted
