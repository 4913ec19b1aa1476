"""The experts of any Mixture of Experts of transformers 5, run by upcycle.

Importing this file lets every model there choose it: ``experts_implementation="upcycle"``.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width,
G = arity * I.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from upcycle.kernels.activations import of_module
from upcycle.kernels.torch_cpu import KernelWeights, run_compiled, run_routed, suits_tiles, visit
from upcycle.kernels.torch_operation import run_as_one_node


def run_experts(
    experts: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts of each token add, weighted.

    Pairs of weight zero cost nothing, and their index is not read. The order of the sums depends on
    the arguments alone, so the result is the same each time. Differentiable. Where shapes may not
    depend on the routing (compilation, export, fake tensors) experts with a `program` are the
    operation ``upcycle::moe``; all others, and those on other devices than the CPU, run
    transformers' `grouped_mm`.

    Args:
        experts: a module with the experts interface of transformers.
        x_TD: tokens, float.
        index_TK: int64.
        weights_TK: float.

    Returns:
        [T, O], in the dtype of `x_TD`.
    """
    static = torch.compiler.is_compiling() or isinstance(x_TD, FakeTensor)
    if x_TD.device.type != "cpu" or (static and not hasattr(experts, "program")):
        y_TO: torch.Tensor = grouped_mm_experts_forward(experts, x_TD, index_TK, weights_TK)
        return y_TO
    if static:
        return run_as_one_node(experts, x_TD, index_TK, weights_TK)
    return visit(weights_of(experts), x_TD, index_TK, weights_TK)


def fits_grouped_mm(*weights: torch.Tensor) -> bool:
    """Whether torch's grouped_mm takes these weights [E, ., .]: no float64, and rows of a multiple
    of 16 bytes, transposed or not."""
    return all(
        w.element_size() <= 4 and all(n * w.element_size() % 16 == 0 for n in w.shape[1:])
        for w in weights
    )


def visit_by_all(shared: Any, x_TD: torch.Tensor) -> torch.Tensor | None:
    """What a `SharedExpert` adds, [T, O]; None where only torch can compute it."""
    if run_compiled is None or torch.compiler.is_compiling() or x_TD.device.type != "cpu":
        return None
    up, down = shared.up, shared.down_proj
    if suits_tiles(up.weight, len(x_TD)):
        return None
    bias_1G = None if up.bias is None else up.bias[None]
    weights = (up.weight[None], bias_1G, down.weight[None], None, of_module(shared))
    index_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64)
    return run_compiled(*weights, x_TD, index_T1, torch.ones(len(x_TD), 1))


def route_and_visit(experts: Any, x_TD: torch.Tensor, router: Any) -> torch.Tensor | None:
    """What those of `Experts` add that a linear router chooses, in one call.

    Args:
        router: as of `upcycle.kernels.compiled.run_routed`.

    Returns:
        [T, O], or None where only torch can compute it.
    """
    if run_routed is None:
        return None
    own = experts._parameters  # less to fetch than attributes, when all caches hold other weights
    up_EGD, down_EOI = own.get(experts.up_name), own.get("down_proj")
    bias_EG, down_bias_EO = own.get(f"{experts.up_name}_bias"), own.get("down_proj_bias")
    if up_EGD is None or down_EOI is None or (bias_EG is None) is experts.has_bias:
        return None
    if suits_tiles(up_EGD, len(x_TD)):
        return None
    return run_routed(up_EGD, bias_EG, down_EOI, of_module(experts), x_TD, router, down_bias_EO)


def weights_of(experts: Any) -> KernelWeights:
    """The parameters of a module with the experts interface of transformers."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    up_EGD, down_EOI = getattr(experts, up), experts.down_proj
    if experts.is_transposed:
        up_EGD, down_EOI = up_EGD.mT, down_EOI.mT
    up_bias_EG = getattr(experts, f"{up}_bias") if experts.has_bias else None
    if hasattr(experts, "program"):
        down_bias_EO = experts.down_bias_EO
    else:
        down_bias_EO = experts.down_proj_bias if experts.has_bias else None
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    norm = experts.post_expert_norm if experts.has_post_expert_norm else None
    name = of_module(experts)
    return KernelWeights(up_EGD, up_bias_EG, down_EOI, down_bias_EO, activate, name, norm)


# The file of a converted model has a copy of this module, which does not replace the installed one.
if __name__ == "upcycle.kernels" or "upcycle" not in ALL_EXPERTS_FUNCTIONS:
    ALL_EXPERTS_FUNCTIONS.register("upcycle", run_experts)
