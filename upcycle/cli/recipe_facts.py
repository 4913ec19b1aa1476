"""What a shipped recipe is for, promises, costs and needs, before any model is named."""

from dataclasses import dataclass

from upcycle.ir.ffn import FFN, Located, Projection
from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.passes.experts import EXPERTS
from upcycle.passes.plan.costs import layer_parameters
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.recipe.schema import Layers, Recipe

_WIDTH, _NEURONS = 4096, 12288  # of an FFN as in most language models
_BOUNDED = ("top_p", "entropy", "null")  # selections of which a token may visit fewer

# What one converts for, in the order of `upcycle recipes`.
GOALS = {
    "train": "more capacity from the same start, to be trained",
    "faster": "a part of the FFN for each token",
    "merge": "the FFNs of several models in one",
    "check": "the dense model in other words",
}


@dataclass(frozen=True)
class RecipeFacts:
    """A recipe in figures, which hold for most models.

    Attributes:
        goal: a key of `GOALS`.
        promise: of a plan with it.
        work: the neurons that a token visits, over those of the FFN.
        is_bound: it is the most that a token visits.
        parameters: of the layer, over those of the FFN.
        needs: the data, in words.
    """

    goal: str
    promise: str
    work: float
    is_bound: bool
    parameters: float
    needs: str

    def text(self) -> str:
        """In one line."""
        bound = "at most " if self.is_bound else ""
        work = f"{bound}{self.work:.3g}x the FFN compute per token"
        return f"{self.promise}; {work}; {self.parameters:.1f}x parameters; needs {self.needs}"


def recipe_facts(recipe: Recipe) -> RecipeFacts:
    """What a plan with the recipe says of one SwiGLU FFN of 12288 neurons."""
    names = ("gate", "up", "down")
    gate, up, down = (Projection(n, f"{n}.weight", None, False, (0, _NEURONS, 1)) for n in names)
    ffn = FFN(
        path="mlp",
        kind="ffn",
        placement="module",
        expansions=(gate, up),
        contraction=down,
        pointwise=NAMED_POINTWISE["swiglu"],
        d_model=_WIDTH,
        d_ff=_NEURONS,
        d_out=_WIDTH,
    )
    experts = recipe.experts
    if experts.method == "from_checkpoints":  # the user names them
        sources = experts.sources or ("base",) * experts.count
        experts = experts.model_copy(update={"sources": sources})
    planned = recipe.model_copy(update={"layers": Layers(), "experts": experts})
    (spec,) = make_plan(Located((ffn,)), planned).specs
    visited = spec.num_experts if spec.router.select == "entropy" else spec.top_k
    work = (min(visited, spec.num_experts) * spec.width + spec.shared) / _NEURONS
    return RecipeFacts(
        goal=_goal(recipe, work),
        promise=spec.promise,
        work=work,
        is_bound=spec.router.select in _BOUNDED,
        parameters=layer_parameters(spec, spec.num_experts) / ffn.num_parameters,
        needs=_needs(recipe),
    )


def _goal(recipe: Recipe, work: float) -> str:
    if recipe.experts.method == "from_checkpoints":
        return "merge"
    if not EXPERTS[recipe.experts.method].deals_neurons:
        return "train"
    return "faster" if work < 1 else "check"


def _needs(recipe: Recipe) -> str:
    wanted, shown = needs(recipe), "nothing but the model"
    if "gradients" in wanted:
        shown = "gradients on calibration data"
    elif wanted or recipe.experts.adaptive:
        shown = "activations on calibration data"
    if recipe.experts.method == "from_checkpoints":
        shown = f"several checkpoints, {shown}" if wanted else "several checkpoints"
    return shown
