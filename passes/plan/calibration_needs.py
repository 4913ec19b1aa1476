"""What calibration has to show before a recipe can be carried out."""

from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import Need
from upcycle.passes.experts.useful import NEEDS
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.recipe.schema import Recipe


def needs(recipe: Recipe) -> frozenset[Need]:
    """``activations``: what each FFN is given in calibration; ``gradients``: of a loss, too."""
    wanted = EXPERTS[recipe.experts.method].needs | ROUTER_METHODS[recipe.router.method].needs
    if recipe.experts.adaptive and recipe.experts.width is not None:
        wanted |= {"gradients"}
    if recipe.compensate.any:
        wanted |= {"activations"}
    if recipe.experts.shared and recipe.experts.shared_by in NEEDS:
        wanted |= {NEEDS[recipe.experts.shared_by]}
    return wanted | {"activations"} if wanted else wanted
