"""Whether a plan can be written in an architecture whose FFNs are those of its layers."""

import re
from collections.abc import Callable
from typing import Any

from transformers.activations import ACT2FN

from upcycle.ir.ffn import FFN
from upcycle.ir.same_function import same_function
from upcycle.ir.spec import MoESpec, Plan
from upcycle.pointwise import Pointwise
from upcycle.targets.native.architecture import DenseArchitecture, NativeTarget


def layer_of(ffn: FFN, source: DenseArchitecture) -> str | None:
    """The layer whose FFN this is, from the names of its weights, or None."""
    pattern = re.compile(rf"(.+)\.{re.escape(source.mlp)}\.(\w+)\.weight")
    matches = [pattern.fullmatch(p.weight) for p in (*ffn.expansions, ffn.contraction)]
    layers = {match[1] for match in matches if match}
    if tuple(match[2] for match in matches if match) != source.roles or len(layers) != 1:
        return None
    return layers.pop()


def is_swiglu(pointwise: Pointwise) -> bool:
    """Whether the values of the function, whatever its name, are those of ``silu(z0) * z1``."""
    return computes(pointwise, "silu", gated=True)


def computes(pointwise: Pointwise, activation: str, *, gated: bool) -> bool:
    """Whether the function is an activation of transformers, times ``z1`` if `gated`."""
    if pointwise.arity != 1 + gated:
        return False
    function: Callable[..., Any] = ACT2FN[activation]
    expected = (lambda gate, up: function(gate) * up) if gated else function
    # Only the name of the activation is written, so transformers' spelling of it replaces the
    # program in every dtype, float64 too: nothing but the roundings of float64 is allowed.
    return same_function(pointwise, expected, tolerance=1e-12)


def plan_reason(
    target: NativeTarget, source: DenseArchitecture, layers: list[str], plan: Plan, *, itemsize: int
) -> str | None:
    """Why a plan does not fit, apart from its router, or None.

    `layers` are those of the dense model, and `itemsize` the bytes of a weight.
    """
    if not plan.specs:
        return "the plan converts nothing"
    for spec in plan.specs:
        if reason := _ffn_reason(spec.ffn, source) or _layer_reason(target, spec):
            return f"{spec.ffn.path}: {reason}"
    first = plan.specs[0]
    for spec in plan.specs:
        for what in ("num_experts", "top_k", "width", "shared"):
            here, there = getattr(spec, what), getattr(first, what)
            if here != there:
                return f"{spec.ffn.path}: {what} is {here}, and {there} in {first.ffn.path}"
        if spec.router.weights != first.router.weights:
            return f"{spec.ffn.path}: its weight rule differs from that of {first.ffn.path}"
    if target.grouped and (first.width * itemsize % 16 or first.ffn.d_model * itemsize % 16):
        least = 16 // itemsize
        return (
            f"{first.ffn.path}: the kernel of transformers wants widths that are multiples of "
            f"{least}, and the experts have {first.width} neurons and {first.ffn.d_model} inputs"
        )
    if first.num_experts < target.fewest:
        return f"its router wants {target.fewest} experts at least"
    if target.most_chosen is not None and first.top_k > target.most_chosen:
        return f"its tokens visit {target.most_chosen} expert each; set `router.top_k: 1`"
    dense = target.dense(sparse_layers(source, layers, plan))
    return dense if isinstance(dense, str) else None


def sparse_layers(source: DenseArchitecture, layers: list[str], plan: Plan) -> list[bool]:
    """For each layer of the dense model, whether the plan converts its FFN."""
    sparse = {layer_of(spec.ffn, source) for spec in plan.specs}
    return [layer in sparse for layer in layers]


def _ffn_reason(ffn: FFN, source: DenseArchitecture) -> str | None:
    if biases := [p.bias for p in (*ffn.expansions, ffn.contraction) if p.bias]:
        return f"its experts have no biases, and the FFN has {biases[0]}"
    gated = len(source.roles) == 3
    if not computes(ffn.pointwise, source.activation, gated=gated):
        wanted = "SwiGLU" if (source.activation, gated) == ("silu", True) else source.activation
        return f"its experts are {wanted}, and the activation here is {ffn.pointwise.name}"
    if layer_of(ffn, source) is None:
        named = ", ".join(dict.fromkeys(source.roles))
        return f"not the `{source.mlp}` of a layer with {named}"
    if ffn.shared:
        return "its linear maps compute something else, too"
    if (ffn.hidden_dropout or ffn.output_dropout) and not source.dropout:
        return "its experts have no dropout, and the FFN has"
    return None


def _layer_reason(target: NativeTarget, spec: MoESpec) -> str | None:
    if spec.low_rank:
        return "it has no low-rank term; set `compensate.low_rank: 0`"
    if spec.layer_config().output_bias:
        return "it has no output bias, which `compensate` makes"
    shared = target.shared
    if shared is None:
        return "it has no shared expert" if spec.shared else None
    if shared.width is None and shared.count is None and not 0 < spec.shared <= spec.width:
        return (
            f"its shared expert is as wide as an expert ({spec.width}), and here it has "
            f"{spec.shared} neurons"
        )
    return None
