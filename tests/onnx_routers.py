"""Every router in ONNX: layers behind it, what they compute in float64, and how exactly.

Nothing here uses the scores, the selection or the weights of the package.

Shape suffixes: T tokens, D d_model, E experts, K chosen experts, H, R hidden and reduced width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from onnx_case import ACTIVATIONS, SLOPE, moe
from torch import Tensor
from torch.nn import functional as F

from upcycle.layers.config import SelectConfig
from upcycle.layers.moe import MoE

D, WIDTH, E, NULLS, ENTRIES = 16, 12, 5, 3, 7
U = torch.finfo(torch.float32).eps / 2
WEIGHTS = ("renormalised", "softmax", "one", "renorm_detach", "gain")
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"hidden": 7},
    "neurons": {},
    "cosine": {"hidden": 3},
    "noisy": {},
    "table": {"entries": ENTRIES, "by": "token"},
}
SELECT: dict[str, dict[str, Any]] = {
    "top_k": {"k": 2},
    "all": {"k": E},
    "top_p": {"k": 4, "mass": 0.55},
    "entropy": {"k": 1, "mass": 0.5, "above": 0.8, "q": 1.1},
    "null": {"k": 2, "nulls": NULLS},
    "expert_choice": {"k": 1},
}
VARIANTS = {"balance": {"balance": True}, "frozen": {"frozen": True}, "tied": {"tied": True}}


def router(kind: str, rule: str, weights: str, **more: Any) -> dict[str, Any]:
    """The configuration of a router."""
    nulls = NULLS if rule == "null" else 0
    select = {"rule": rule, **SELECT[rule]}
    return {
        "kind": kind,
        "select": select,
        "weights": weights,
        "nulls": nulls,
        **KINDS[kind],
    } | more


# Every kind, selection, weight rule and variant; each is combined with several activations.
MAIN = {
    **{f"top_k {w}": router("linear", "top_k", w) for w in WEIGHTS},
    "all softmax": router("linear", "all", "softmax"),
    "top_p renorm_detach": router("linear", "top_p", "renorm_detach"),
    "entropy renormalised": router("linear", "entropy", "renormalised"),
    "null softmax": router("linear", "null", "softmax"),
    "expert_choice one": router("linear", "expert_choice", "one"),
    **{kind: router(kind, "top_k", "renormalised") for kind in KINDS if kind != "linear"},
    **{name: router("linear", "top_k", "renormalised", **more) for name, more in VARIANTS.items()},
}
# What is left of the selections x weight rules, and of the kinds x selections. A table has no
# scores of null experts, so these two are no router.
RULES = {
    f"{rule} {w}": router("linear", rule, w)
    for rule in SELECT
    for w in WEIGHTS
    if f"{rule} {w}" not in MAIN
}
MIXED = {
    f"{kind} {rule} {WEIGHTS[(i + j) % 5]}": router(kind, rule, WEIGHTS[(i + j) % 5])
    for i, kind in enumerate(KINDS)
    for j, rule in enumerate(SELECT)
    if kind != "linear" and rule != "top_k" and (kind, rule) != ("table", "null")
}


def layer_of(config: dict[str, Any], activation: str, seed: int = 0, **shape: Any) -> MoE:
    """Random experts with biases, behind a router without: equal scores for a token of zeros."""
    shape = {"num_experts": E, "width": WIDTH, "d_model": D} | shape
    made = moe(activation, **shape).config
    own = {"pointwise": ACTIVATIONS[activation], "bias": False, "scale": 1.5, **config}
    own["select"] = SelectConfig.from_json(config["select"])
    layer = MoE(replace(made, router=replace(made.router, **own))).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name == "router.expert":
                rows = [torch.randperm(shape["num_experts"], generator=draw) for _ in tensor]
                tensor.copy_(torch.stack(rows)[:, : tensor.shape[1]])
                continue
            size = 3.0 if name.startswith("router") and "gain" not in name else 1.0
            size = 0.1 if "selection_bias" in name else size
            drawn = torch.randn(tensor.shape, generator=draw)
            tensor.copy_(drawn * size / tensor.shape[-1] ** 0.5)
        if config["kind"] == "cosine":
            layer.router.temperature.fill_(0.3)
    return layer


# What it computes


def scores(layer: MoE, x_TD: Tensor, ids_T: Tensor) -> Tensor:
    """The logits of each token, null experts last, [T, E] float64."""
    held = {name: t.double() for name, t in layer.router.state_dict().items()}
    kind = layer.config.router.kind
    if kind in ("linear", "noisy"):
        return x_TD @ held["weight"].T
    if kind == "mlp":
        unit_TD = x_TD / x_TD.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (unit_TD @ held["weight_in"].T).tanh() @ held["weight_out"].T
    if kind == "neurons":
        z = [x_TD @ weight_ED.T for weight_ED in held["weight"]]
        return layer.experts.act_fn.pointwise(*z).abs()
    if kind == "cosine":
        small_TR, row_ER = x_TD @ held["reduce"].T, held["weight"]
        lengths_TE = small_TR.norm(dim=1, keepdim=True) * row_ER.norm(dim=1)
        return small_TR @ row_ER.T / lengths_TE.clamp(min=1e-12) / held["temperature"]
    index_TK = held["expert"].long()[ids_T % ENTRIES]
    return torch.full((len(x_TD), E), -1e4).double().scatter(1, index_TK, 0.0)


def visited(scores_TE: Tensor, select: SelectConfig, *, last: bool = False) -> list[list[int]]:
    """The experts of each token; of equal scores the lowest is the best, or the `last`."""
    rule, k = select.rule, select.k
    p_TE = scores_TE.softmax(-1)
    count = scores_TE.shape[1]
    places = list(range(count))
    if rule == "expert_choice":
        tokens = list(range(len(p_TE)))
        capacity = -(-len(tokens) * k // count)
        taken = [_best(p_TE[:, e].tolist(), tokens, last)[:capacity] for e in places]
        return [[e for e in places if t in taken[e]] for t in tokens]
    found = []
    for score_E, p_E in zip(scores_TE.tolist(), p_TE.tolist(), strict=True):
        order = _best(score_E, places, last)
        before = [sum(p_E[e] for e in order[:i]) for i in places]
        if rule == "all":
            order = places
        elif rule == "top_k":
            order = order[:k]
        elif rule == "top_p":
            order = [e for i, e in enumerate(order[:k]) if before[i] <= select.mass]
        elif rule == "null":
            order = [e for e in order[:k] if e < count - select.nulls]
        elif _tsallis(p_E, select.q) <= select.above:
            inside = [before[i] + p_E[e] <= select.mass for i, e in enumerate(order)]
            order = [e for i, e in enumerate(order) if i < k or inside[i]]
        found.append(order)
    return found


def _best(values: Sequence[float], places: list[int], last: bool) -> list[int]:
    return sorted(places, key=lambda i: (-values[i], -i if last else i))


def _tsallis(p: Sequence[float], q: float) -> float:
    return (1 - sum(v**q for v in p)) / (1 - len(p) ** (1 - q))


def weights(layer: MoE, x_TD: Tensor, ids_T: Tensor, *, last: bool = False) -> Tensor:
    """The weight of each expert for each token, zero where it does not go, [T, E] float64."""
    config, held = layer.config.router, layer.router.state_dict()
    logits_TE = scores(layer, x_TD, ids_T)
    p_TE = logits_TE.softmax(-1)
    by_TE = p_TE + held["selection_bias"].double() if config.balance else logits_TE
    count = layer.experts.num_experts
    made_TE = torch.zeros(len(x_TD), count, dtype=torch.float64)
    for t, chosen in enumerate(visited(by_TE, config.select, last=last)):
        p_K = p_TE[t, chosen]
        rule = config.weights
        if rule == "one":
            p_K = torch.ones_like(p_K)
        elif rule == "gain":
            p_K = 1 + held["gain"].double()[chosen] * p_K
        elif rule != "softmax":
            p_K = p_K / p_K.sum()
        made_TE[t, chosen] = p_K * config.scale
    return made_TE


@torch.no_grad()
def exact(layer: MoE, x: Tensor, ids_T: Tensor, *, last: bool = False) -> Tensor:
    """The layer at `x` [T, D] in float64, [T, D]."""
    x_TD = x.double()
    made_TD = _experts(layer, x_TD, weights(layer, x_TD, ids_T, last=last), magnitude=False)
    return made_TD + layer.output_bias.double() if layer.output_bias is not None else made_TD


def _experts(layer: MoE, x_TD: Tensor, weights_TE: Tensor, *, magnitude: bool) -> Tensor:
    """All experts on all tokens, weighted; with the absolute value of everything if `magnitude`."""
    experts, pointwise = layer.experts, layer.experts.act_fn.pointwise

    def sized(tensor: Tensor) -> Tensor:
        return tensor.double().abs() if magnitude else tensor.double()

    z_ETG = sized(x_TD) @ sized(experts.up_EGD).mT
    if experts.up_bias_EG is not None:
        z_ETG = z_ETG + sized(experts.up_bias_EG)[:, None]
    z = z_ETG.chunk(pointwise.arity, -1)
    hidden_ETI = math.prod(z) if magnitude else pointwise(*z)
    y_ETD = hidden_ETI @ sized(experts.down_proj).mT
    return torch.einsum("etd,te->td", y_ETD, sized(weights_TE))


# How exactly


@torch.no_grad()
def bound(layer: MoE, x: Tensor, ids_T: Tensor) -> float:
    """How far a float32 evaluation can be from the exact one, as `onnx_case.bound` derives it.

    The logits of a kind have errors of their own, `logit_error`, and each weight is off by at most
    twice the largest of them: those of a softmax relative to itself, those of a gain times `g p`.
    """
    x_TD = x.double()
    weights_TE = weights(layer, x_TD, ids_T)
    if layer.router.weights == "gain":
        scale, gain_E = layer.router.scale, layer.router.gain.double().abs()
        weights_TE = (weights_TE != 0) * (1 + gain_E) * scale
    largest = _experts(layer, x_TD, weights_TE, magnitude=True).max().item()
    if layer.output_bias is not None:
        largest += layer.output_bias.abs().max().item()
    arity, d_model = layer.experts.act_fn.pointwise.arity, x.shape[-1]
    products = layer.experts.intermediate_dim + layer.experts.num_experts + 1
    errors = SLOPE * arity * (d_model + 1) + products + 8 + 78
    return (errors * U + 2 * logit_error(layer, x_TD)) * largest


def logit_error(layer: MoE, x_TD: Tensor) -> float:
    """How far a logit in float32 can be from the exact one, to first order.

    A sum of n products is off by n U times the sum of their magnitudes; dividing by a length of n
    numbers adds n / 2 + 3 roundings, and what its argument is off by twice, over that length.
    """
    held = {name: t.double().abs() for name, t in layer.router.state_dict().items()}
    kind, size_TD, d_model = layer.config.router.kind, x_TD.abs(), x_TD.shape[1]
    if kind == "table":
        return 0.0
    if kind == "mlp":
        hidden_TH = F.normalize(size_TD, dim=1) @ held["weight_in"].T
        off_TH = (1.5 * d_model + 3) * hidden_TH + 4  # tanh has a slope of one, and is at most one
        off_TH = off_TH + hidden_TH.clamp(max=1) * (hidden_TH.shape[1] + 1)
        return U * (off_TH @ held["weight_out"].T).max().item()
    if kind == "cosine":
        length_T = (x_TD @ layer.router.reduce.double().T).norm(dim=1)
        size_T = (size_TD @ held["reduce"].T).norm(dim=1)
        ratio = (size_T / length_T.clamp(min=1e-12)).max().item()
        reduced = held["reduce"].shape[0]
        off = 2 * d_model * ratio + 2 * (reduced / 2 + 3) + reduced + 3
        return U * off / held["temperature"].min().item()
    if kind == "neurons":
        z = [size_TD @ weight_ED.T for weight_ED in held["weight"]]
        return U * (SLOPE * len(z) * (d_model + 1) + 8) * math.prod(z).max().item()
    return U * (d_model + 1) * (size_TD @ held["weight"].T).max().item()
