"""What a shipped recipe promises, costs and needs, before any model is named."""

from upcycle.ir.ffn import FFN, Located, Projection
from upcycle.kernels.activations import NAMED_POINTWISE
from upcycle.passes.plan.plan import make_plan, needs
from upcycle.recipe.schema import Layers, Recipe

_WIDTH, _NEURONS = 4096, 12288  # of an FFN as in most language models
_BOUNDED = ("top_p", "entropy", "null")  # selections of which a token may visit fewer


def recipe_facts(recipe: Recipe) -> str:
    """The promise, the active part of the FFN, and the data that a recipe needs, in one line.

    They are those of a plan for one SwiGLU FFN of 12288 neurons, and hold for most models.
    """
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
    active = (min(visited, spec.num_experts) * spec.width + spec.shared) / _NEURONS
    wanted = needs(recipe)
    shown = "nothing but the model"
    if "gradients" in wanted:
        shown = "gradients on calibration data"
    elif wanted or experts.adaptive:
        shown = "activations on calibration data"
    if experts.method == "from_checkpoints":
        shown = f"several checkpoints, {shown}" if wanted else "several checkpoints"
    bound = "at most " if spec.router.select in _BOUNDED else ""
    return f"{spec.promise}; a token meets {bound}{active:.0%} of the FFN; needs {shown}"
