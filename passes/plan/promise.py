"""What the algebra says about a converted layer: is it the dense FFN?"""

from upcycle.ir.spec import Promise
from upcycle.passes.experts import EXPERTS
from upcycle.passes.experts.granular import placement_is_exact
from upcycle.pointwise import Pointwise
from upcycle.recipe import schema as recipe
from upcycle.recipe.schema import Recipe


def promise_of(
    made: Recipe, pointwise: Pointwise, *, num_experts: int, top_k: int, scale: float
) -> Promise:
    """Whether the layer is equal to the dense FFN for every input, up to rounding.

    Write ``FFN(x) = b + sum_j n_j(x)``, one term for each neuron j. The layer computes
    ``b + scale * sum_k w_k E_k(x)`` over the K chosen of N experts, where parts of one FFN have b
    in common, and ``scale * sum_k w_k E_k(x)`` where each is a whole FFN with a b of its own.
    `total` is the sum of the weights where it does not depend on the token: 1
    for ``renormalised`` and ``renorm_detach``, K for ``one``, and for ``softmax`` 1 if K = N.

    - Copies: every ``E_k`` is the FFN, so the layer is exact iff ``scale * total = 1``.
    - Slices of copies: if the chosen ones are whole copies with equal weights within a copy, a
      copy of weight q (q / G for each of its G slices) adds ``q / G * S (FFN - b)``. The factor
      S of `experts.granular.total_scale` makes the sum ``FFN - b`` if `total` exists. Whole copies
      are chosen if K is a multiple of G and the router has one row for each copy, and also if
      all experts are chosen with weight one. The placement of S must suit the activation.
    - A residual layer keeps the FFN as a shared expert and routes experts that add nothing: exact.
    - Splits: each neuron is in one expert, so ``sum_k E_k = FFN - b`` over all N experts: exact
      with weights one and K = N. With K < N that holds as soon as the layer is run with K = N.
    """
    experts, router = made.experts, made.router
    kind = EXPERTS[experts.method].kind
    total = _total(router, num_experts=num_experts, top_k=top_k)
    if made.compensate.any:
        return "approximate"
    if kind == "residual":
        return "exact"
    if kind == "copies":
        is_exact = total is not None and abs(scale * total - 1) < 1e-12
        return "exact" if is_exact else "approximate"
    if kind == "slices":
        is_grouped = router.method == "virtual_group" or experts.granularity == 1
        is_whole = top_k % experts.granularity == 0 and (
            is_grouped or (router.weights == "one" and top_k == num_experts)
        )
        is_placed = placement_is_exact(experts.scale, pointwise)
        is_best = router.select in ("top_k", "all")
        is_exact = total is not None and is_best and is_whole and is_placed and scale == 1
        return "exact" if is_exact else "approximate"
    if kind != "split" or scale != 1:
        return "approximate"
    if router.weights not in ("one", "gain") and num_experts > 1:
        return "approximate"
    is_all = router.select in ("top_k", "all") and top_k == num_experts
    return "exact" if is_all else "exact with all experts"


def _total(router: recipe.Router, *, num_experts: int, top_k: int) -> float | None:
    """The sum of the expert weights before training, or None if it depends on the token."""
    count = {"top_k": top_k, "all": num_experts}.get(router.select)
    if router.weights in ("one", "gain"):
        return count
    if router.weights == "softmax":
        return 1.0 if count == num_experts else None
    return None if router.select in ("null", "expert_choice") else 1.0
