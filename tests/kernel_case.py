"""Experts, routed tokens, and what they give, for the tests of kernels."""

from dataclasses import replace
from typing import Any

import numerics
import torch

from upcycle.ir.weights import FFNWeights
from upcycle.layers.experts import Experts

COUNT, TOP_K, D_MODEL, WIDTH = 6, 3, 16, 8
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def made(
    name: str,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    d_out: int = D_MODEL,
    d_model: int = D_MODEL,
    width: int = WIDTH,
) -> tuple[list[FFNWeights], Experts]:
    """FFNs without an output bias, and the module that has them as experts."""
    sizes: dict[str, Any] = {"d_model": d_model, "d_ff": width, "d_out": d_out, "bias": bias}
    ffns = [numerics.random_ffn(name, dtype=dtype, seed=seed, **sizes) for seed in range(COUNT)]
    ffns = [replace(ffn, down_bias_O=None) for ffn in ffns]
    experts = Experts(COUNT, d_model, width, d_out, pointwise=ffns[0].pointwise, bias=bias)
    experts.to(dtype).requires_grad_(False)
    experts.up_EGD.copy_(torch.stack([ffn.up_MFD.flatten(0, 1) for ffn in ffns]))
    experts.down_proj.copy_(torch.stack([ffn.down_OF for ffn in ffns]))
    if experts.up_bias_EG is not None:
        rows = [ffn.up_bias_MF.flatten() for ffn in ffns if ffn.up_bias_MF is not None]
        experts.up_bias_EG.copy_(torch.stack(rows))
    return ffns, experts


def routed(tokens: int, dtype: torch.dtype, *, gaps: bool, d_model: int = D_MODEL) -> Routed:
    """Tokens, index and weights; with `gaps` some weights are zero, one token's all of them."""
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, d_model, generator=generator, dtype=torch.float64).to(dtype)
    index_TK = torch.rand(tokens, COUNT, generator=generator).topk(TOP_K).indices
    weights_TK = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64) + 0.5
    if gaps:
        weights_TK[-1, 1] = weights_TK[tokens // 2] = 0
        index_TK[weights_TK == 0] = COUNT  # that of an expert of another process
    return x_TD, index_TK, weights_TK.to(torch.promote_types(dtype, torch.float32))


def expected(
    ffns: list[FFNWeights], dtype: torch.dtype, given: Routed
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over all experts in float64, and how far rounding may take it."""
    x_TD, index_TK, weights_TK = given
    weights_TN = torch.zeros(len(x_TD), COUNT + 1).double()
    weights_TN = weights_TN.scatter_add(1, index_TK, weights_TK.double())[:, :COUNT]
    wide = [ffn.to(torch.float64) for ffn in ffns]
    y_TO = sum(weights_TN[:, n, None] * ffn(x_TD.double()) for n, ffn in enumerate(wide))
    assert isinstance(y_TO, torch.Tensor)
    bound_TO = numerics.bound(ffns, x_TD, dtype, weights_TN=weights_TN, experts=TOP_K)
    return y_TO, bound_TO + torch.finfo(torch.float64).tiny  # of nobody it is zero
