"""One MoE layer in the tensors of an architecture, and back.

Shape suffixes: E experts, M expansions, I expert width, S width of the shared expert, D d_model,
G = M * I, O d_out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from upcycle.errors import UnsupportedError
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, MoEWeights
from upcycle.targets.native.architecture import FusedTensors, NativeTarget
from upcycle.targets.native.fold_router import Fold, temper

GATE_NOISE = 1e-8  # llama.cpp computes the gate as silu(x) / x, and a gate of zero is NaN


def folded(weights: MoEWeights, fold: Fold, target: NativeTarget, spec: MoESpec) -> MoEWeights:
    """The layer with the weights that the architecture wants; tensors that stay are not copied.

    Raises:
        UnsupportedError: the experts are not, or no longer, what the fold needs.
    """
    experts = weights.experts
    up, down = experts.up_EGD, experts.down_EOI
    if fold.needs == "copies" and not bool((up == up[:1]).all() and (down == down[:1]).all()):
        raise _changed(target, spec, "are not equal, and its router holds only copies")
    if fold.needs == "zeros" and down.any():
        raise _changed(target, spec, "are not zero, and it holds only experts that add nothing")
    if "gain" in weights.router and weights.router["gain"].any():
        raise _changed(target, spec, "have gains by now, and its router has none")
    if fold.needs == "distances":  # the router is multiplied by a large number
        if len(set(map(tuple, weights.router["weight"].tolist()))) < spec.num_experts:
            raise _changed(target, spec, "have equal router rows, and its router needs a best one")
        if down.dtype == torch.float16:
            how = "are float16, and its router needs larger numbers than that"
            raise _changed(target, spec, how)
    if fold.down != 1:
        experts = replace(experts, down_EOI=scaled(down, fold.down))
    shared = shared_on_disk(weights, target, spec)
    router = router_on_disk(weights.router, fold, spec)
    return replace(weights, experts=experts, router=router, shared=shared)


def scaled(down: torch.Tensor, factor: float) -> torch.Tensor:
    """The product, rounded once: it is computed in float32 or wider."""
    return (down.to(torch.promote_types(down.dtype, torch.float32)) * factor).to(down.dtype)


def router_on_disk(
    router: Mapping[str, torch.Tensor], fold: Fold, spec: MoESpec
) -> dict[str, torch.Tensor]:
    """The tensors of the router, among them those that the architecture has."""
    if not fold.router or spec.router_config().kind != "linear":
        return {"weight": torch.zeros(spec.num_experts, spec.ffn.d_model)}
    weight = router["weight"].float()
    factor = fold.router * (temper(weight) if fold.tempered else 1.0)
    made = {"weight": weight * factor}
    if "selection_bias" in router:
        made["selection_bias"] = router["selection_bias"].float()
    if "bias" in router:
        made["bias"] = router["bias"].float() * factor
        if fold.bias:
            made["selection_bias"] = made["bias"] * fold.bias
    return made


def unfolded(weights: MoEWeights, fold: Fold, target: NativeTarget, spec: MoESpec) -> MoEWeights:
    """The layer of the recipe again, up to one rounding.

    A router of zeros stays one, and a tempered one stays so: the order of its scores is the same.
    """
    experts, router = weights.experts, dict(weights.router)
    if fold.down not in (0, 1):
        experts = replace(experts, down_EOI=experts.down_EOI / fold.down)
    made = {"weight": router["weight"] / (fold.router or 1)}
    config = spec.router_config()
    if config.bias:
        bias = router.get("bias", torch.zeros(spec.num_experts))
        made["bias"] = router["selection_bias"] / fold.bias if fold.bias else bias
    if config.balance:
        made["selection_bias"] = router["selection_bias"]
    if config.weights == "gain":
        made["gain"] = torch.zeros(spec.num_experts)
    shared = weights.shared if spec.shared else None
    if shared is not None:
        half = 0.5 if target.shared and target.shared.gate else 1.0
        up_1MSD = _expansions(shared)[:, :, : spec.shared]
        shared = ExpertWeights(
            up_1MSD.flatten(1, 2),
            None,
            shared.down_EOI[..., : spec.shared] * half,
            torch.full((1, spec.shared), -1),
        )
    return replace(weights, experts=experts, router=made, shared=shared)


def _expansions(weights: ExpertWeights) -> torch.Tensor:
    """[E, M, I, D]."""
    count, _, d_model = weights.up_EGD.shape
    return weights.up_EGD.reshape(count, -1, weights.down_EOI.shape[2], d_model)


def _changed(target: NativeTarget, spec: MoESpec, how: str) -> UnsupportedError:
    return UnsupportedError(
        f"{spec.ffn.path}: the experts {how}; write it as another architecture than "
        f"{target.model_type}"
    )


def shared_on_disk(
    weights: MoEWeights, target: NativeTarget, spec: MoESpec
) -> ExpertWeights | None:
    """The shared expert as wide as it is on disk, and doubled if it has a gate."""
    if target.shared is None or not (target.shared.always or target.shared.size(spec)):
        return None
    size = target.shared.size(spec)
    like = weights.experts
    arity = like.up_EGD.shape[1] // like.down_EOI.shape[2]
    up = like.up_EGD.new_zeros(1, arity, size, like.up_EGD.shape[2])
    down = like.down_EOI.new_zeros(1, like.down_EOI.shape[1], size)
    if weights.shared is not None:
        given = _expansions(weights.shared)
        up[:, :, : given.shape[2]] = given
        down[..., : given.shape[2]] = weights.shared.down_EOI
    if target.shared.gate is not None:  # the sigmoid of its gate is a half
        down *= 2
    return ExpertWeights(up.flatten(1, 2), None, down, torch.full((1, size), -1))


def gate_noise(shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    """A gate whose sigmoid is a half, and which is nowhere zero."""
    noise = torch.randn(shape, generator=draw) * GATE_NOISE
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return (noise.abs().clamp(min=least).copysign(noise)).to(dtype)


def interleaved(up_EGD: torch.Tensor, arity: int) -> torch.Tensor:
    """Rows in the order gate 0, up 0, gate 1, up 1, ..."""
    count, _, d_model = up_EGD.shape
    return up_EGD.reshape(count, arity, -1, d_model).transpose(1, 2).flatten(1, 2)


def fuse(layout: FusedTensors, weights: ExpertWeights) -> Mapping[str, torch.Tensor]:
    """The tensors of the experts under their names, with ``{layer}``."""
    up, down = weights.up_EGD, weights.down_EOI
    if layout.interleaved:
        up = interleaved(up, 2)
    if layout.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    made = {layout.up: up, layout.down: down}
    if layout.biases is not None:
        count, rows, _ = weights.up_EGD.shape
        bias = torch.zeros(count, rows // 2, 2, dtype=up.dtype, device=up.device)
        bias[..., 1] = layout.up_bias
        made[layout.biases[0]] = bias.flatten(1)
        made[layout.biases[1]] = bias.new_zeros(count, weights.down_EOI.shape[1])
    return made


def unfuse(
    layout: FusedTensors, read: Callable[[str], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused expansions [E, 2I, D] and the contractions [E, D, I] out of `fuse`'s tensors."""
    up, down = read(layout.up), read(layout.down)
    if layout.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if layout.interleaved:
        up = interleaved(up, up.shape[1] // 2)  # back again
    return up.contiguous(), down.contiguous()
