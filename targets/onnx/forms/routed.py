"""What the forms are told of a layer: its experts, and what is known of the weights they get."""

from dataclasses import dataclass

from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE
from upcycle.models.moe_layers import MoELayer


@dataclass(frozen=True)
class Routed:
    """Experts behind a router.

    Attributes:
        top_k: the most experts that a token visits.
        total: the sum of the weights of a token, or None if it differs from token to token.
        has_signs: a weight may be negative.
    """

    experts: Experts
    top_k: int
    total: float | None = None
    has_signs: bool = False


def routed(layer: MoE) -> Routed:
    """A layer of upcycle."""
    router = layer.router
    select, weights = router.config.select, router.weights
    by_score = select.rule in ("top_k", "top_p", "null")
    top_k = min(select.k, router.num_experts) if by_score else router.num_experts
    total = None
    if weights in ("renormalised", "renorm_detach"):
        total = None if select.rule in ("null", "expert_choice") else float(router.scale)
    elif weights == "one" and select.rule in ("top_k", "all"):
        total = float(router.scale * top_k)
    has_signs = weights == "gain"  # 1 + g p
    if has_signs and not router.gain.is_meta:
        has_signs = not bool((router.gain > -1).all())
    return Routed(layer.experts, top_k, total, has_signs)


def given(layer: MoELayer) -> Routed:
    """A layer whose router is not ours: transformers' are softmaxes and sigmoids, so no weight is
    negative."""
    assert isinstance(layer.experts, Experts)
    return Routed(layer.experts, layer.top_k or layer.num_experts)
