"""The fused experts as one operation of torch, which compilers do not look into.

It has no gradient: `upcycle.kernels.triton` does not call it where one is needed.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width, G = I or
2 I.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations import moe

from upcycle.kernels import fits_grouped_mm
from upcycle.kernels.triton.launch import launch


def unfused(*weights: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The function of transformers for these weights."""
    fits = fits_grouped_mm(*weights)
    function: Callable[..., torch.Tensor] = (
        moe.grouped_mm_experts_forward if fits else moe.batched_mm_experts_forward
    )
    return function


@torch.library.custom_op("upcycle::triton_experts", mutates_args=())
def fused_experts(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    down_EOI: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_bias_EO: torch.Tensor | None,
    act: str,
    gated: bool,
    transposed: bool,
) -> torch.Tensor:
    """``sum_k w_k (act(x G_k^T) * x U_k^T) D_k^T``, [T, D] -> [T, O]; see `experts_forward`.

    Args:
        x_TD: in the dtype of the weights: float32, bfloat16 or float16.
        index_TK: integers; E and more stand for nothing.
        weights_TK: any float dtype.
        up_EGD: the rows of the gate come first if `gated`; [E, D, G] if `transposed`.
        down_EOI: [E, I, O] if `transposed`.
        act: a name in `upcycle.kernels.activations` with a number in the kernels.
    """
    up_EGD, down_EOI = (w.transpose(1, 2) if transposed else w for w in (up_EGD, down_EOI))
    return launch(
        x_TD, index_TK, weights_TK, up_EGD, down_EOI, up_bias_EG, down_bias_EO, act, gated
    )


@fused_experts.register_fake
def _fake(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    down_EOI: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    transposed: bool = rest[-1]
    return x_TD.new_empty(len(x_TD), down_EOI.shape[2 if transposed else 1])
