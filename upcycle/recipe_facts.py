"""What a shipped recipe promises, costs and needs, before any model is named."""

from dataclasses import dataclass

from upcycle.passes.experts import EXPERTS
from upcycle.passes.needs import needs
from upcycle.recipe import Recipe
from upcycle.recipe_file import load_recipe

PROMISES = {
    "copies": "exact: it starts as the dense model",
    "slices": "exact: it starts as the dense model",
    "residual": "exact: it starts as the dense model",
    "altered": "approximate: the experts are changed copies",
    "split": "exact when all experts are run",
    "subsets": "approximate: experts share or leave out neurons",
}


@dataclass(frozen=True)
class RecipeFacts:
    """Facts for a list: how near to the dense model, the active part of the FFN, and the input."""

    promise: str
    active: str
    needs: str

    def __str__(self) -> str:
        return f"{self.promise}; a token meets {self.active}; needs {self.needs}"


def shipped_facts(name: str) -> RecipeFacts:
    """Of a shipped recipe."""
    return recipe_facts(load_recipe(name))


def recipe_facts(recipe: Recipe) -> RecipeFacts:
    """What can be said of `recipe` for every model; ``upcycle plan`` says what it is for one."""
    experts, router = recipe.experts, recipe.router
    kind = EXPERTS[experts.method].kind
    promise = PROMISES[kind]
    if kind == "split" and router.top_k == "all" and router.select in ("top_k", "all"):
        promise = "exact: all experts are run"
    if recipe.compensate.any:
        promise = "approximate: compensated in closed form"
    wanted = needs(recipe)
    input_of = "nothing but the model"
    if "gradients" in wanted:
        input_of = "gradients on calibration data"
    elif wanted or experts.adaptive:
        input_of = "activations on calibration data"
    if experts.method == "from_checkpoints":
        input_of = f"several checkpoints, and {input_of}" if wanted else "several checkpoints"
    return RecipeFacts(promise, _active(recipe, kind), input_of)


def _active(recipe: Recipe, kind: str) -> str:
    """The neurons that a token meets, relative to those of the dense FFN, at most."""
    experts, router = recipe.experts, recipe.router
    if kind == "subsets" or isinstance(experts.shared, float):
        return "see `upcycle plan`"
    slices = experts.granularity if kind in ("slices", "residual") else 1
    routed = experts.count - (experts.shared if kind == "split" else 0)
    top_k = routed if router.top_k == "all" else router.top_k
    parts = experts.count if kind == "split" else slices
    part = (top_k + (experts.shared if kind == "split" else 0)) / parts
    part += 1 if kind == "residual" else 0
    return f"{part:.0%} of the FFN"
