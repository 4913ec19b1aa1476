"""What rounding the experts of an ONNX file did to each layer, and whether that is as expected.

The choice of experts is left out of the comparison: each layer is computed again, with the rounded
and with the float weights, on the tokens and expert weights that it gets in the file.

Shape suffixes: T tokens, D d_model, E experts, I expert width, G = arity * I.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from upcycle.ir.measured import Check, Rounded
from upcycle.ir.quantise import largest_of, spread
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.experts import Experts
from upcycle.onnx.inputs import Array
from upcycle.onnx.run import run
from upcycle.pointwise import Pointwise
from upcycle.verification.checks import (
    HALF_STEP,
    ROUNDED_KERNEL,
    ROUNDED_LAYER,
    ROUNDED_WEIGHTS,
    worst_at,
)
from upcycle.verification.onnx.rounded_layers import RoundedLayer, rounded_layers

_INDEPENDENT = 2.0  # an error this many times that of independent errors is a mistake


def verify_rounding(
    path: Path, layers: Mapping[str, Experts], feeds: Mapping[str, Array]
) -> tuple[list[Rounded], list[Check]]:
    """What rounding did to each layer of a file, and three checks of it.

    - Each weight is within half a step of its float one.
    - ONNX Runtime computes the rounded layer as PyTorch does, up to the rounding of tokens to
      8 bits that its int8 kernel does in blocks.
    - The error of a layer is at most twice what independent errors of that size, in each weight,
      give to first order.

    `layers` are the experts with the float weights, by the paths of their layers; `feeds` the
    inputs of the file.
    """
    rounded = list(rounded_layers(path))
    if not rounded:
        return [], []
    names = [name for layer in rounded for name in (layer.x, layer.weights, layer.y)]
    seen = run(path, feeds, names)
    rows: list[Rounded] = []
    for layer in rounded:
        arrays = (seen[name] for name in (layer.x, layer.weights, layer.y))
        tensors = (torch.from_numpy(array).float() for array in arrays)
        rows.append(_row(layer, layers[layer.layer], *tensors))

    def worst(field: str) -> dict[str, float]:  # of the calls of a layer
        values = sorted((getattr(row, field), row.path) for row in rows)
        return {path: value for value, path in values}

    checks = [
        worst_at(ROUNDED_WEIGHTS, worst("half_steps"), HALF_STEP),
        worst_at(ROUNDED_KERNEL, worst("kernel_over_allowed"), 1.0),
        worst_at(ROUNDED_LAYER, worst("rounding_over_expected"), _INDEPENDENT),
    ]
    return rows, checks


@torch.no_grad()
def _row(
    rounded: RoundedLayer,
    experts: Experts,
    x_TD: torch.Tensor,
    weights_TE: torch.Tensor,
    y: torch.Tensor,
) -> Rounded:
    bias = experts.up_bias_EG
    up, down = experts.up_EGD.float(), experts.down_proj.float()
    bias = None if bias is None else bias.float()
    pointwise = experts.act_fn.pointwise
    kernel = rounded.pointwise or pointwise
    ours = weighted_sum(kernel, rounded.up_EGD, bias, rounded.down_EDI, x_TD, weights_TE)
    exact = weighted_sum(pointwise, up, bias, down, x_TD, weights_TE)
    up_error, down_error = rounded.up_EGD - up, rounded.down_EDI - down
    group = rounded.rounds_tokens
    off = _expected_error(experts, up_error, down_error, x_TD, weights_TE, group)
    if group:
        none = torch.zeros_like(up), torch.zeros_like(down)
        of_tokens = _expected_error(experts, *none, x_TD, weights_TE, group)
        gap = _rms(y - ours) / (_INDEPENDENT * of_tokens or 1.0)
    else:
        allowed = ROUNDING[rounded.dtype] * ours.abs().max().item()
        gap = (y - ours).abs().max().item() / (allowed or 1.0)
    size, error = _rms(exact), _rms(y - exact)
    return Rounded(
        path=rounded.layer,
        bits=rounded.bits,
        block=rounded.block,
        weights_rms={"up": _relative(up_error, up), "down": _relative(down_error, down)},
        output_rms=error / size if size else 0.0,
        half_steps=max(
            float((2 * error.abs() / step.abs()).max())
            for error, step in zip((up_error, down_error), rounded.step, strict=True)
        ),
        kernel_over_allowed=gap,
        rounding_over_expected=error / off if off else 0.0,
    )


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _relative(error: torch.Tensor, reference: torch.Tensor) -> float:
    return float(error.norm() / reference.norm().clamp(min=1e-30))


def weighted_sum(
    pointwise: Pointwise,
    up_EGD: torch.Tensor,
    bias_EG: torch.Tensor | None,
    down_EDI: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TE: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of experts, [T, D]."""
    out_TD = x_TD.new_zeros(len(x_TD), down_EDI.shape[1])
    for expert, weight_T in enumerate(weights_TE.unbind(1)):
        token = weight_T.nonzero()[:, 0]
        z_tG = x_TD[token] @ up_EGD[expert].T
        if bias_EG is not None:
            z_tG = z_tG + bias_EG[expert]
        hidden_tI = pointwise(*z_tG.chunk(pointwise.arity, dim=-1))
        out_TD[token] += (hidden_tI @ down_EDI[expert].T) * weight_T[token, None]
    return out_TD


def _expected_error(
    experts: Experts,
    up_error_EGD: torch.Tensor,
    down_error_EDI: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TE: torch.Tensor,
    group: int,
) -> float:
    """The rms error of the output if each weight has its error with a random sign, to first order.

    Variances pass through the layer: those of a sum add up, and the activation multiplies them by
    the squares of its derivatives. Unless 0, `group` is the group size in which the inputs of both
    matrices are rounded to 8 bits.
    """
    total_TD = torch.zeros(len(x_TD), down_error_EDI.shape[1])
    bias_EG, pointwise = experts.up_bias_EG, experts.act_fn.pointwise
    for expert, weight_T in enumerate(weights_TE.unbind(1)):
        token = weight_T.nonzero()[:, 0]
        x_tD = x_TD[token]
        up_GD, down_DI = experts.up_EGD[expert].float(), experts.down_proj[expert].float()
        z_tG = x_tD @ up_GD.T
        z_tG = z_tG if bias_EG is None else z_tG + bias_EG[expert].float()
        variance_tG = x_tD.square() @ up_error_EGD[expert].square().T
        if group:
            variance_tG += _rounding_variance(x_tD, group) @ up_GD.square().T
        hidden_tI, variance_tI = _through(pointwise, z_tG, variance_tG)
        variance_tD = variance_tI @ down_DI.square().T
        variance_tD += hidden_tI.square() @ down_error_EDI[expert].square().T
        if group:
            variance_tD += _rounding_variance(hidden_tI, group) @ down_DI.square().T
        total_TD[token] += variance_tD * weight_T[token, None].square()
    return float(total_TD.mean().sqrt())


def _through(
    pointwise: Pointwise, z_tG: torch.Tensor, variance_tG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden activations, and their variance given a small one of the arguments."""
    with torch.enable_grad():
        z = [part.detach().requires_grad_() for part in z_tG.chunk(pointwise.arity, dim=-1)]
        hidden_tI = pointwise(*z)
        slopes = torch.autograd.grad(hidden_tI.sum(), z)
    variances = variance_tG.chunk(pointwise.arity, dim=-1)
    parts = [slope.square() * part for slope, part in zip(slopes, variances, strict=True)]
    return hidden_tI.detach(), torch.stack(parts).sum(0)


def _rounding_variance(x: torch.Tensor, group: int) -> torch.Tensor:
    """The variance of rounding to 255 steps over the range of each group."""
    return spread(largest_of(x, group) / 127, group, x.shape[-1]).square() / 12
