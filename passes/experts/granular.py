"""Copies of the FFN, each cut into slices; and the factor that makes up for averaging slices.

Notation: E copies, G slices of each, T chosen experts. Expert ``e * G + g`` is slice g of copy e.
With a virtual-group router the G slices of a copy get the same logit, so the T = G * t chosen
experts are t whole copies. Their outputs are multiplied by the factor S.
"""

from collections.abc import Iterator

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.weights import gather_experts
from upcycle.kernels.activations import NAMED_ACTIVATIONS, NAMED_POINTWISE
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts
from upcycle.pointwise import Pointwise
from upcycle.recipe import schema as recipe

# f(c z) = c^degree f(z) for every c > 0.
_DEGREE = {
    form.name: row.degree + form.arity - 1
    for row in NAMED_ACTIVATIONS
    if row.degree is not None
    for form in row.forms()
}

# f(z_0, c z_1) = c f(z_0, z_1): the expansion that the activation does not read is linear.
_LINEAR_UP = frozenset(name for name, form in NAMED_POINTWISE.items() if form.arity == 2)


def total_scale(experts: recipe.Experts, router: recipe.Router, top_k: int) -> float:
    """The factor S that the slices need so that the layer is the dense FFN.

    - ``renormalised``, ``renorm_detach``: a copy of weight q gives q / G to each slice, and the q
      sum to one, so S = G.
    - ``one``: t = T / G copies are added up in full, so S = G / T. With T = G that is 1.
    - ``softmax``: the chosen weights sum to w(x), which depends on the token; with equal logits it
      is T / (E G), so S = E G^2 / T is right for a small router only (and for T = E G).
    """
    copies, slices = experts.count, experts.granularity
    if router.weights == "one":
        return slices / top_k
    if router.weights == "softmax":
        return copies * slices**2 / top_k
    return float(slices)


def placement(scale: str, pointwise: Pointwise, total: float) -> tuple[float, float, bool]:
    """Put a factor of `total` on the matrices: the factors and `scale_gate` of `gather_experts`.

    - ``down``: all of it on the contraction, which is linear: exact for every activation.
    - ``up_down``: its root on the expansion that f is linear in, and on the contraction; for a
      plain f of degree d, the factor c with ``c^d * c = total`` on both.
    - ``even``: the same factor c on every matrix and bias: c^3 = total for a gated FFN and
      squared ReLU, c^2 = total for another plain FFN.
    """
    if scale == "down":
        return 1.0, total, True
    if scale == "up_down" and pointwise.arity > 1:
        return total**0.5, total**0.5, False
    root = total ** (1 / (_DEGREE.get(pointwise.name, pointwise.arity) + 1))
    return root, root, True


def placement_is_exact(scale: str, pointwise: Pointwise) -> bool:
    """Whether `placement` multiplies the output of the FFN by its factor for every input."""
    if scale == "down":
        return True
    if scale == "up_down" and pointwise.arity > 1:
        return pointwise.name in _LINEAR_UP
    return pointwise.name in _DEGREE


def granular(dense: DenseLayer) -> Parts:
    """Cut each copy of the FFN into G contiguous slices, and scale them.

    Exact if T is a multiple of G, the router is ``virtual_group``, the weights are not ``softmax``
    (with T < E G), and the placement of the factor is exact for the activation. The authors' own
    placement, ``even``, is exact for ReLU, squared ReLU and ReGLU. It is not exact for GELU and
    SwiGLU: without biases and with E = G = T = 8, the relative error is 0.17 and 0.20; the authors
    report that it trains better nevertheless.

    Returns:
        E * G experts of width F / G, scaled. Memory: E times the dense FFN.

    Source:
        He et al., "Upcycling Large Language Models into Mixture of Experts", 2024, equation 2,
        https://arxiv.org/abs/2410.07524
    """
    spec = dense.spec
    slices_GI = torch.arange(dense.d_ff).reshape(spec.experts.granularity, -1)
    total = total_scale(spec.experts, spec.router, spec.top_k)
    up, down, gate = placement(spec.experts.scale, dense.ffn.pointwise, total)
    neuron_EI = slices_GI.repeat(spec.experts.count, 1)
    experts = gather_experts(dense.ffn, neuron_EI, up_scale=up, down_scale=down, scale_gate=gate)
    return Parts(experts)


def _refuse(ffn: FFN, made: recipe.Recipe) -> Iterator[str]:
    """Slices that are not equal, tokens without whole copies, a factor with no exact place."""
    slices, top_k = made.experts.granularity, made.router.top_k
    if ffn.d_ff % slices:
        divisors = [n for n in range(1, ffn.d_ff + 1) if ffn.d_ff % n == 0]
        below = max(n for n in divisors if n < slices)
        above = min((n for n in divisors if n > slices), default=below)
        choice = f"{below}" if above == below else f"{below} or {above}"
        yield (
            f"{ffn.d_ff} neurons cannot be cut into {slices} equal slices; "
            f"set `experts.granularity` to {choice}"
        )
    if top_k != "all" and top_k % slices:
        yield (
            f"a token that visits {top_k} experts gets no whole number of copies, "
            f"which have {slices} slices each; set `router.top_k` to a multiple of {slices}"
        )
    if made.experts.scale == "up_down" and not placement_is_exact("up_down", ffn.pointwise):
        yield (
            f"`experts.scale: up_down` changes what {ffn.pointwise.name} computes, since no "
            "expansion enters it linearly; set `experts.scale: down`"
        )


GRANULAR = ExpertMethod(name="granular", kind="slices", build=granular, refuse=_refuse)
