"""Whether a layer runs the experts that its router chose.

Right after upcycling all experts are equal, and a layer that always runs the first two, or adds
them up with the wrong weights, passes every comparison with the dense model. So a copy of the layer
gets experts that differ from each other and a router that spreads the tokens, and is compared with
a reference that shares no code with the layer.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen, I neurons, G rows of an expert.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from upcycle.layers.moe import MoE
from upcycle.verification.metrics import distance
from upcycle.verification.near_ties import chosen

TOKENS = 32
NEURONS = 1024  # in the wider type at a time


@torch.no_grad()
def distinct_experts_error(layer: MoE, x_TD: torch.Tensor) -> float:
    """The relative error of a copy of `layer` with distinct experts, on 32 tokens of `x_TD`.

    The layer is in eval mode. The error is infinite if the router chose experts that do not have
    the best scores.
    """
    x_TD = x_TD[:TOKENS]
    changed = _made_distinct(layer, x_TD)
    changed.router.stand_in(len(x_TD))
    _, weights_TK, index_TK = changed.router(x_TD)
    weights_TK = weights_TK.double()
    if changed.config.router.is_plain:  # scores and weights can be had without the router's code
        logits_TE = x_TD.double() @ changed.router.weight.double().t()
        if changed.router.bias is not None:
            logits_TE = logits_TE + changed.router.bias.double()
        if not _has_best_scores(changed, x_TD, logits_TE, index_TK):
            return math.inf
        weights_TK = _weights(changed, logits_TE, index_TK)
    # Of the reference: its rounding is negligible beside that of the layer.
    wide = torch.float32 if x_TD.dtype.itemsize == 2 else torch.float64
    expected_TO = _reference(changed, x_TD.to(wide), weights_TK.to(wide), index_TK)
    return distance(changed.tokens(x_TD), expected_TO).relative


def _made_distinct(layer: MoE, x_TD: torch.Tensor) -> MoE:
    """A copy with each neuron scaled by a factor of its own, and a router with logits of about one.

    Experts with a contraction of zeros get another one first.
    """

    generator = torch.Generator().manual_seed(0)

    def factors(*shape: int) -> torch.Tensor:
        drawn = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        return drawn.to(layer.experts.down_proj)

    def scaled(tensor: torch.Tensor, *shape: int) -> nn.Parameter:
        return nn.Parameter(tensor * factors(*shape), requires_grad=False)

    experts = layer.experts
    up_EGD, up_bias_EG, down_EOI = experts.up_EGD, experts.up_bias_EG, experts.down_proj
    num_experts, rows, d_model = up_EGD.shape
    is_zero = not any(down_OI.any() for down_OI in down_EOI)
    held_EOI = factors(*down_EOI.shape) if is_zero else down_EOI
    # deepcopy takes these instead of copying the experts, which may be gigabytes.
    instead: dict[int, Any] = {id(up_EGD): scaled(up_EGD, num_experts, rows, 1)}
    instead[id(down_EOI)] = scaled(held_EOI, num_experts, 1, experts.intermediate_dim)
    if up_bias_EG is not None:
        instead[id(up_bias_EG)] = scaled(up_bias_EG, num_experts, rows)
    if (bias_EO := experts.down_bias_EO) is not None:
        held_EO = bias_EO if bias_EO.any() else torch.ones_like(bias_EO)
        instead[id(bias_EO)] = scaled(held_EO, *bias_EO.shape)
    changed = copy.deepcopy(layer, instead)
    if layer.config.router.is_plain:
        length = x_TD.double().norm(dim=-1).mean().item() or 1.0
        drawn_ED = torch.randn(num_experts, d_model, generator=generator, dtype=torch.float64)
        changed.router.weight.copy_(drawn_ED / length)
    return changed


def _has_best_scores(
    layer: MoE, x_TD: torch.Tensor, logits_TE: torch.Tensor, index_TK: torch.Tensor
) -> bool:
    """Whether each row of `index_TK` has the K best experts, up to rounding of the scores."""
    k = layer.config.router.select.k
    if index_TK.shape != (len(x_TD), k):
        return False
    chosen_TE = chosen((index_TK, None), layer.config.num_experts)
    if not bool((chosen_TE.sum(1) == k).all()):
        return False
    if k == layer.config.num_experts:
        return True
    worst_T = logits_TE.masked_fill(~chosen_TE, math.inf).amin(1)
    best_left_T = logits_TE.masked_fill(chosen_TE, -math.inf).amax(1)
    magnitude_T = (x_TD.double().abs() @ layer.router.weight.double().abs().t()).amax(1)
    rounding_T = x_TD.shape[-1] * torch.finfo(torch.float32).eps * magnitude_T
    return bool((worst_T >= best_left_T - rounding_T).all())


def _weights(layer: MoE, logits_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """The weights of the chosen experts by their definition, in float64."""
    config = layer.config.router
    p_TK = logits_TE.gather(1, index_TK).exp()
    if config.weights == "one":
        p_TK = torch.ones_like(p_TK)
    elif config.weights == "softmax":
        p_TK = p_TK / logits_TE.exp().sum(1, keepdim=True)
    else:
        p_TK = p_TK / p_TK.sum(1, keepdim=True)
    return p_TK * config.scale


def _reference(
    layer: MoE, x_TD: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token in the dtype of `x_TD`, and the sum of the chosen ones."""
    config = layer.config
    weight_TE = x_TD.new_zeros(len(x_TD), config.num_experts).scatter(1, index_TK, weights_TK)
    total_TO = x_TD.new_zeros(len(x_TD), config.d_out)
    for expert in range(config.num_experts):
        for start in range(0, config.width, NEURONS):
            total_TO += weight_TE[:, expert, None] * _neurons(layer, expert, start, x_TD)
    if layer.experts.down_bias_EO is not None:
        total_TO += weight_TE @ layer.experts.down_bias_EO.to(x_TD.dtype)
    return total_TO + _for_every_token(layer, x_TD)


def _for_every_token(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """The shared expert, the low-rank term and the bias, in the dtype of `x_TD`."""
    pointwise = layer.config.pointwise
    state = layer.state_dict()
    few = [name for name in state if not name.startswith(("experts.", "router."))]
    tensors = {name: state[name].to(x_TD.dtype) for name in few}
    total_TO: torch.Tensor = x_TD.new_zeros(len(x_TD), layer.config.d_out)
    if layer.shared_expert is not None:
        up = f"shared_expert.{layer.shared_expert.up_name}"
        z_TG = x_TD @ tensors[f"{up}.weight"].t() + tensors.get(f"{up}.bias", 0.0)
        hidden = pointwise(*z_TG.chunk(pointwise.arity, dim=-1))
        total_TO = total_TO + hidden @ tensors["shared_expert.down_proj.weight"].t()
    if layer.low_rank is not None:
        v_RD, u_OR = tensors["low_rank.0.weight"], tensors["low_rank.1.weight"]
        total_TO = total_TO + x_TD @ v_RD.t() @ u_OR.t()
    if layer.output_bias is not None:
        total_TO = total_TO + tensors["output_bias"]
    return total_TO


def _neurons(layer: MoE, expert: int, start: int, x_TD: torch.Tensor) -> torch.Tensor:
    """The output of `NEURONS` neurons of one expert, which are copied to the wider type."""
    experts, width, pointwise = layer.experts, layer.config.width, layer.config.pointwise
    stop = min(start + NEURONS, width)
    z = []
    for i in range(pointwise.arity):
        rows = slice(i * width + start, i * width + stop)
        z_TI = x_TD @ experts.up_EGD[expert, rows].to(x_TD.dtype).t()
        if experts.up_bias_EG is not None:
            z_TI = z_TI + experts.up_bias_EG[expert, rows].to(x_TD.dtype)
        z.append(z_TI)
    return pointwise(*z) @ experts.down_proj[expert, :, start:stop].to(x_TD.dtype).t()
