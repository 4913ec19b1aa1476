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

from upcycle.kernels.activations import of_module
from upcycle.kernels.triton.launch import is_interpreted
from upcycle.kernels.triton.operation import fused_experts, unfused

NAME = "upcycle_triton"


def why_unfused(module: Any, *inputs: torch.Tensor) -> str | None:
    """Why these experts run unfused on `inputs`; None if they run in the kernels.

    Raises:
        UnsupportedError: Triton is not installed.
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
    recorded the experts run unfused, by torch's grouped_mm.

    Args:
        self: a module with ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
        hidden_states: tokens [T, D].
        top_k_index: [T, K] integers.
        top_k_weights: [T, K].

    Returns:
        [T, O], in the dtype of the tokens.

    Raises:
        UnsupportedError: Triton is not installed.
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    weight, down = getattr(self, up), self.down_proj
    if why_unfused(self, hidden_states, top_k_weights) is not None:
        return unfused(weight, down)(self, hidden_states, top_k_index, top_k_weights)
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


moe.ExpertsInterface.register(NAME, experts_forward)
