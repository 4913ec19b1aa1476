"""How the weights of a recipe's router become those of an architecture: the folding rules.

With k of E experts chosen, p the weights that the architecture computes and s the factor of the
recipe, ``p * fold.down`` are the weights of the recipe:

- p renormalised, recipe ``renormalised``: ``down = s``.
- p renormalised, recipe ``one``, k = E: a router of zeros makes p = 1/k, so ``down = k s``; k = 1:
  p = 1 whatever the router says.
- p renormalised, recipe ``one``, 1 < k < E: a router times a small power of two (`temper`) chooses
  the same experts and makes p almost 1/k. Not exact: `tempered`, and only on request.
- p not renormalised: the same with E instead of k; for a sigmoid of zeros, a half, with 2.
- p the softmax, recipe ``one`` or ``renormalised``, k = 1, logits in float32 (`RouterRule.hot`): a
  router times 2**60 makes p one, unless two experts tie to the last bit; only on request.
- recipe ``renorm_detach``: as ``renormalised``; ``gain``: as ``one`` while all gains are zero. Both
  train otherwise, so only on request.
- copies: all experts are equal, so any weights that sum to one will do, also those of a router of
  zeros; only on request, because that is no longer so after training. Likewise experts of zeros.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from upcycle.ir.spec import MoESpec
from upcycle.targets.native.architecture import NativeTarget, RouterRule

# What is left of the distance of two experts' router rows. The inputs of an FFN have about the size
# one, so logits are then some 2**-10 apart, and weights as much; a softmax before the choice can
# tell logits apart that differ by 2**-24.
TEMPERED_DISTANCE = 2.0**-11
HOT = 2.0**60  # times a difference of one bit of a logit of 1e-9, still far beyond a softmax's 17
MOST_WEIGHT_ERROR = 0.02
MOST_ELSEWHERE = 0.01  # share of the tokens whose experts differ because logits were too near


Condition = Literal["", "copies", "zeros", "distances", "gains", "forward"]
# What a fold may need -> why it is made only on request.
CONDITIONS: dict[Condition, str] = {
    "copies": "it holds experts only while they are equal",
    "zeros": "it holds experts only while they are zero",
    "distances": "its router gives the best expert the weight one only while no two scores tie",
    "gains": "it has no gains for its experts, and holds them only while they are zero",
    "forward": "it computes the same, but its router has another gradient",
}
TEMPERED = "its router cannot give every chosen expert the weight one, only almost"
# Rules that compute what another one does until, or unless, they are trained.
SAME_FORWARD: dict[str, tuple[str, Condition]] = {
    "renorm_detach": ("renormalised", "forward"),
    "gain": ("one", "gains"),
}


@dataclass(frozen=True)
class Fold:
    """What is done to the layer of a recipe.

    Attributes:
        down: factor on the down projections of the routed experts.
        router: factor on the router, zero or a power of two; besides that of `temper`.
        config: fields of the config.
        needs: a key of `CONDITIONS`, if it is right only under a condition.
        tempered: the weights are those of the recipe within `MOST_WEIGHT_ERROR`.
        bias: factor from the bias of a tempered router to the selection bias that holds it, or 0.
    """

    down: float = 1.0
    router: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)
    needs: Condition = ""
    tempered: bool = False
    bias: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether it is right for any experts, so also after training."""
        return not self.tempered and not self.needs


def temper(weight_ED: torch.Tensor) -> float:
    """The power of two that brings the rows of a router within `TEMPERED_DISTANCE` of their mean.

    A power of two changes no bit of a mantissa, so the scores keep their order.
    """
    distance = (weight_ED - weight_ED.mean(0)).norm(dim=1).max().item()
    if not distance:
        return 1.0
    return 2.0 ** math.floor(math.log2(TEMPERED_DISTANCE / distance))


def fold(target: NativeTarget, spec: MoESpec) -> Fold | str:
    """The folding rule for a layer and the first form of `target`, or why there is none."""
    form = target.forms[0]
    rule, needs = SAME_FORWARD.get(spec.router.weights, (spec.router.weights, ""))
    made = _weights(form, spec, rule) or _special(form, spec, rule)
    if made is None:
        return _why_not(target, spec)
    if needs and not made.needs:
        made = replace(made, needs=needs)
    if made.needs != "zeros" and (reason := _selection_reason(target, form, spec, made)):
        return reason
    config = dict(form.config)
    if form.factor is not None:
        config[form.factor] = made.down
        made = replace(made, down=1.0)
    return replace(made, config=config)


def fold_of(target: NativeTarget, spec: MoESpec) -> Fold:
    """The folding rule for a layer of a target that holds it."""
    made = fold(target, spec)
    assert isinstance(made, Fold), made
    return made


def _weights(form: RouterRule, spec: MoESpec, rule: str) -> Fold | None:
    """The rules that hold for any experts."""
    k, scale = spec.top_k, spec.scale
    every = k == spec.num_experts
    if form.score == "input":
        return None
    if form.score == "sigmoid" and not form.renormalise:  # its zeros are a half for each expert
        return Fold(2 * scale, 0.0) if rule == "one" and every else None
    sum_is_one = form.renormalise or (every and form.score == "softmax")
    even = scale * (k if sum_is_one else spec.num_experts)  # what undoes p if the logits are equal
    if k == 1 and form.renormalise and rule in ("renormalised", "one"):
        return Fold(scale, 1.0 if form.score == "softmax" else 2.0**-4)
    if rule == "one" and every:
        return Fold(even, 0.0)
    if k == 1 and form.hot and rule in ("renormalised", "one") and spec.router.method != "zero":
        return Fold(scale, HOT, needs="distances")
    if rule == "one":
        sigmoid = form.score == "sigmoid"
        return Fold(even, tempered=True, bias=0.25 if sigmoid else 0.0)  # its slope at zero
    if form.score == "softmax" and rule == ("renormalised" if form.renormalise else "softmax"):
        return Fold(scale)
    if form.score == "softmax" and every and rule in ("renormalised", "softmax"):
        return Fold(scale)  # all weights sum to one
    return None


def _special(form: RouterRule, spec: MoESpec, rule: str) -> Fold | None:
    """The rules that hold for copies, and for experts of zeros."""
    if form.score == "sigmoid" and not form.renormalise:
        return None  # the other form of such a router holds them
    if spec.experts.method == "zero_routed":
        return Fold(needs="zeros")
    if spec.experts.method != "copy" or rule != "renormalised" or form.score == "input":
        return None
    if form.renormalise:
        return Fold(spec.scale, needs="copies")
    return Fold(spec.scale * spec.num_experts / spec.top_k, 0.0, needs="copies")


def _selection_reason(
    target: NativeTarget, form: RouterRule, spec: MoESpec, made: Fold
) -> str | None:
    """Why the experts would be chosen otherwise than the recipe says, or None."""
    router = spec.router_config()
    if router.kind != "linear":
        return _not_linear(spec)
    every = spec.top_k == spec.num_experts
    other_choice = "its router takes the best `top_k` of linear scores, and this one does not"
    if router.select.rule != "top_k" and not (router.select.rule == "all" and every):
        return other_choice
    if router.tied:
        return "its router cannot be tied to the experts; set `router.tied: false`"
    if (every and made.router == 0) or made.needs in ("copies", "zeros"):
        return None
    biased_choice = target.selection_bias and form.score == "softmax" and not made.tempered
    if router.balance and not biased_choice:
        return other_choice
    if router.bias and not (target.router_bias or (made.bias and target.selection_bias)):
        return "its router has no bias; set `router.bias: false`"
    return None


def _why_not(target: NativeTarget, spec: MoESpec) -> str:
    rule = spec.router.weights
    if spec.router_config().kind != "linear":
        return _not_linear(spec)
    followed = {_name(form) for form in target.forms if form.score != "input"}
    if not followed:
        return "its router multiplies the input of an expert, so it holds only `zero_routed`"
    if rule in followed:
        return f"its router has weights `{rule}` only where all experts are chosen"
    does = " or ".join(f"`{name}`" for name in sorted(followed))
    return f"its router does not follow weights `{rule}`; it does {does}"


def _not_linear(spec: MoESpec) -> str:
    return f"its router is linear, and that of the recipe is not ({spec.router.method})"


def _name(form: RouterRule) -> str:
    if form.score == "sigmoid":
        return "one"
    return "renormalised" if form.renormalise else "softmax"
