"""Fused MoE experts in Triton, as an implementation of the experts interface of transformers.

Importing this module registers ``experts_implementation="upcycle_triton"``; Triton itself is
imported by the first call. Any experts module of the interface can use it. What the kernels do not
know (`why_unfused`) runs unfused, with the same result up to rounding.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, S = T * K slots, I expert
width, G = I or 2 I.
"""

from typing import Any

import torch
from transformers.integrations import moe

from upcycle.kernels import fits_grouped_mm
from upcycle.kernels.activations import of_module
from upcycle.kernels.triton.launch import is_interpreted, launch

NAME = "upcycle_triton"


def why_unfused(module: Any, *inputs: torch.Tensor) -> str | None:
    """Why these experts run unfused on `inputs`; None if they run in the kernels.

    Raises: as `experts_forward`.
    """
    down: torch.Tensor = module.down_proj
    if not (down.is_cuda or is_interpreted()):
        return f"the weights are on {down.device.type}, and Triton runs on GPUs"
    if down.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels have no {str(down.dtype).removeprefix('torch.')}"
    if down.dtype == torch.bfloat16 and not down.is_cuda:
        return "Triton's interpreter multiplies the bits of bfloat16 as integers"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *module.parameters())):
        return "gradients are recorded: run it under torch.no_grad()"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows each expert"
    if module.has_gate and not getattr(module, "is_concatenated", True):
        return "the rows of gate and up alternate"
    if of_module(module) is None:
        return f"the kernels do not know this activation: {module.act_fn}"
    return None


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run experts by the interface of transformers 5, fused where possible.

    Deterministic; slots with weight zero and experts of other processes (index >= E) cost nothing.
    Sums are in float32, and so are the activation and the router weight. Where gradients are
    recorded the experts run unfused, by torch's grouped_mm. The arguments are those of
    `upcycle.kernels.run_experts`.

    Raises:
        UnsupportedError: Triton is not installed.
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    weight, down = getattr(self, up), self.down_proj
    if why_unfused(self, hidden_states, top_k_weights):
        fits = fits_grouped_mm(weight, down)
        run: Any = moe.grouped_mm_experts_forward if fits else moe.batched_mm_experts_forward
        return run(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
    out: torch.Tensor = fused_experts(
        hidden_states.to(down.dtype),
        top_k_index,
        top_k_weights,
        weight,
        down,
        getattr(self, f"{up}_bias") if self.has_bias else None,
        self.down_proj_bias if self.has_bias else None,
        str(of_module(self)),
        self.has_gate,
        self.is_transposed,
    )
    return out.to(hidden_states.dtype)


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

    It has no gradient, and compilers do not look into it.

    Args:
        x_TD: in the dtype of the weights: float32, bfloat16 or float16.
        index_TK: integers; E and more are ignored.
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


moe.ExpertsInterface.register(NAME, experts_forward)
