"""What calibration has to show before a recipe can be carried out."""

from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.method import Need
from upcycle.passes.experts.useful import NEEDS
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.recipe.schema import Recipe


def needs(recipe: Recipe) -> frozenset[Need]:
    """``activations``: what each FFN is given in calibration; ``gradients``: of a loss, too."""
    experts = recipe.experts
    wanted = {EXPERTS[experts.method].needs, ROUTER_METHODS[recipe.router.method].needs}
    if experts.adaptive and experts.width is not None:
        wanted.add("gradients")
    if experts.shared:
        wanted.add(NEEDS.get(experts.shared_by))
    if recipe.compensate.any or any(wanted):
        wanted.add("activations")
    return frozenset(need for need in wanted if need is not None)
