"""Which ONNX node an MoE layer becomes.

``com.microsoft::MoE`` is one kernel in ONNX Runtime, for five activations. An activation is
recognised by its values and not by its name, so that one spelled out in many steps is found too.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from upcycle.moe import MoE
from upcycle.onnx_options import Onnx
from upcycle.pointwise import Pointwise
from upcycle.targets.onnx.cost_model import Work, seconds

Form = Literal["fused", "unrolled", "quantised"]


@dataclass(frozen=True)
class Fused:
    """The fused node: its `activation_type`, and whether the rows of gate and up alternate."""

    activation: str
    gated: bool = False


_GELU_TANH = Pointwise(1, (("gelu", ("z0",), {"approximate": "tanh"}),))
_GELU_ERF = Pointwise(1, (("gelu", ("z0",), {}),))
# The kernel's "gelu" is the tanh form: 3e-4 from the erf form.
KERNELS = (
    (Fused("relu"), Pointwise(1, (("relu", ("z0",), {}),))),
    (Fused("silu"), Pointwise(1, (("silu", ("z0",), {}),))),
    (Fused("gelu"), _GELU_TANH),
    (Fused("identity"), Pointwise(1, (("mul", ("z0", 1.0), {}),))),
    (
        Fused("swiglu", gated=True),
        Pointwise(2, (("silu", ("z0",), {}), ("mul", ("t0", "z1"), {}))),
    ),
)


def same_function(a: Pointwise, b: Pointwise) -> bool:
    """True if `a` and `b` agree to 1e-6 on 1300 points between -1e15 and 1e15."""
    if a.arity != b.arity:
        return False
    far = torch.logspace(-3, 15, 400, dtype=torch.float64)
    points = torch.cat([torch.linspace(-12, 12, 501, dtype=torch.float64), far, -far])
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    z = [points, points[order]][: a.arity]
    return torch.allclose(a(*z), b(*z), rtol=1e-6, atol=1e-6)


def choose(layer: MoE, options: Onnx) -> tuple[Form, Fused | None]:
    """The form of `layer` under `options`, and the fused node if it is one.

    What the kernels do not compute is unrolled under every option.
    """
    fused = fused_form(layer, gelu=options.gelu)
    if fused is None or options.form == "unrolled":
        return "unrolled", None
    may_round = options.may_round and _fits_quantised(layer, options.bits)
    if options.form == "quantised":
        return ("quantised", fused) if may_round else ("unrolled", None)
    if options.form == "fused":
        return "fused", fused
    if options.profile == "portable":
        return "unrolled", None
    if options.profile == "cuda":
        return "quantised" if may_round else "fused", fused
    form = _fastest(layer, fused, options, may_round=may_round)
    return form, None if form == "unrolled" else fused


def _fits_quantised(layer: MoE, bits: int) -> bool:
    """Whether the kernel for rounded weights takes the shapes: two 4-bit numbers fill a byte."""
    experts = layer.experts
    return bits == 8 or (experts.hidden_dim % 2 == 0 and experts.intermediate_dim % 2 == 0)


def _fastest(layer: MoE, fused: Fused, options: Onnx, *, may_round: bool) -> Form:
    experts = layer.experts
    work = Work(
        tokens=options.tokens or 256,
        num_experts=experts.num_experts,
        top_k=most_visited(layer),
        d_model=experts.hidden_dim,
        width=experts.intermediate_dim,
        arity=1 + fused.gated,
        gelu=fused.activation == "gelu",
    )
    blocks = "" if options.block in ("row", "adaptive") else " blocks"
    kinds: dict[Form, str] = {"unrolled": "unrolled", "fused": "fused"}
    if may_round:
        kinds["quantised"] = f"int{options.bits}{blocks}"
    return min(kinds, key=lambda form: seconds(kinds[form], work))


def fused_form(layer: MoE, *, gelu: str = "exact") -> Fused | None:
    """The fused node that computes `layer`, or None if there is none.

    Args:
        layer: the layer.
        gelu: ``tanh`` lets the kernel's tanh form stand for the erf form.
    """
    pointwise = layer.experts.act_fn.pointwise
    router = layer.router
    if router.weights == "gain" and (router.gain.is_meta or not bool((router.gain > -1).all())):
        return None  # 1 + g p may be negative, and the kernel takes logarithms
    if pointwise.arity > 2 or layer.experts.hidden_dim != layer.experts.down_proj.shape[1]:
        return None
    for form, program in KERNELS:
        if same_function(pointwise, program):
            return form
    if gelu == "tanh" and same_function(pointwise, _GELU_ERF):
        return Fused("gelu")
    return None


def total_weight(layer: MoE) -> float | None:
    """The sum of the expert weights of a token, or None if it differs from token to token."""
    router = layer.router
    rule = router.config["select"]["rule"]
    if router.weights in ("renormalised", "renorm_detach"):
        return None if rule in ("null", "expert_choice") else float(router.scale)
    if router.weights == "one" and rule in ("top_k", "all"):
        return float(router.scale * most_visited(layer))
    return None


def most_visited(layer: MoE) -> int:
    """How many experts a token visits at most."""
    select = layer.router.config["select"]
    by_score = select["rule"] in ("top_k", "top_p", "null")
    return min(select["k"], layer.router.num_experts) if by_score else layer.router.num_experts
