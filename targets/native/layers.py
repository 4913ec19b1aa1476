"""Whether a plan can be written in an architecture whose FFNs are the SwiGLU of decoder layers."""

import re
from collections.abc import Collection

import torch

from upcycle.ffn import FFN
from upcycle.pointwise import Pointwise
from upcycle.routing import WeightRule
from upcycle.spec import MoESpec, Plan

# Gate, up and down of a decoder layer, as Llama, Mistral and Qwen name them.
ROLES = ("gate_proj", "up_proj", "down_proj")
_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.(\w+)\.weight")


def layer_index(ffn: FFN) -> int | None:
    """The decoder layer whose ``mlp`` this FFN is, from the names of its weights, or None."""
    matches = [_WEIGHT.fullmatch(p.weight) for p in (*ffn.expansions, ffn.contraction)]
    found = [(int(match[1]), match[2]) for match in matches if match]
    layers = {layer for layer, _ in found}
    if tuple(role for _, role in found) != ROLES or len(layers) != 1:
        return None
    return layers.pop()


def is_swiglu(pointwise: Pointwise) -> bool:
    """Whether the function is ``silu(z0) * z1``: decided by its values, not by its name."""
    if pointwise.arity != 2:
        return False
    z = torch.linspace(-20, 20, 161, dtype=torch.float64)
    gate, up = torch.meshgrid(z, z, indexing="ij")
    expected = torch.nn.functional.silu(gate) * up
    return torch.allclose(pointwise(gate, up), expected, rtol=1e-12, atol=1e-12)


def plan_reason(
    plan: Plan,
    *,
    num_layers: int,
    weight_rules: Collection[WeightRule],
    needs_all_layers: bool,
) -> str | None:
    """Why a plan does not fit, or None.

    Args:
        plan: what is converted.
        num_layers: decoder layers of the model.
        weight_rules: the rules that the router of the architecture can follow.
        needs_all_layers: the architecture has no dense layers.
    """
    if not plan.specs:
        return "the plan converts nothing"
    for spec in plan.specs:
        reason = _ffn_reason(spec.ffn) or _router_reason(spec, weight_rules)
        if reason is not None:
            return f"{spec.ffn.path}: {reason}"
    first = plan.specs[0]
    for spec in plan.specs:
        for what in ("num_experts", "top_k", "width"):
            here, there = getattr(spec, what), getattr(first, what)
            if here != there:
                return f"{spec.ffn.path}: {what} is {here}, and {there} in {first.ffn.path}"
        if spec.router.weights != first.router.weights:
            return f"{spec.ffn.path}: its weight rule differs from that of {first.ffn.path}"
    layers = [layer_index(spec.ffn) for spec in plan.specs]
    dense = sorted(set(range(num_layers)) - set(layers))
    if needs_all_layers and dense:
        listed = ", ".join(map(str, dense[:8])) + (", ..." if len(dense) > 8 else "")
        return f"it has no dense layers, and the plan leaves these dense: {listed}"
    return None


def _ffn_reason(ffn: FFN) -> str | None:
    biases = [p.bias for p in (*ffn.expansions, ffn.contraction) if p.bias]
    if biases:
        return f"its experts have no biases, and the FFN has {biases[0]}"
    if not is_swiglu(ffn.pointwise):
        return f"its experts are SwiGLU, and the activation here is {ffn.pointwise.name}"
    if layer_index(ffn) is None:
        return "not the `mlp` of a decoder layer with gate_proj, up_proj and down_proj"
    if ffn.hidden_dropout or ffn.output_dropout:
        return "its experts have no dropout, and the FFN has"
    return None


def _router_reason(spec: MoESpec, weight_rules: Collection[WeightRule]) -> str | None:
    router = spec.router
    if spec.shared:
        return "it has no shared expert"
    if spec.low_rank:
        return "it has no low-rank term; set `compensate.low_rank: 0`"
    if spec.layer_config()["output_bias"]:
        return "it has no output bias, which `compensate` makes"
    if router.weights not in weight_rules:
        known = " or ".join(f"`{rule}`" for rule in weight_rules)
        if router.weights == "one":
            return f"its router cannot give every chosen expert the weight one; it does {known}"
        return f"its router does not follow weights `{router.weights}`; it does {known}"
    if not spec.is_plain:
        return "its router takes the best `top_k` of linear scores, and this one does not"
    if router.bias:
        return "its router has no bias; set `router.bias: false`"
    if router.tied:
        return "its router cannot be tied to the experts; set `router.tied: false`"
    if spec.scale != 1:
        return f"its router does not scale the weights, and router.scale is {spec.scale:g}"
    return None
