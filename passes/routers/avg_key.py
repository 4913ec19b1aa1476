"""An expert is scored by the mean pre-activation of its neurons."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.method import RouterMethod, linear
from upcycle.recipe.schema import Router


def avg_key(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Make each router row the mean of the expert's keys: the rows that the activation reads.

    The logit of an expert is then the mean pre-activation of its neurons (their biases not
    counted). Padding is not counted either. It is what `upcycle.layers.moe.MoE.tie_router`
    recomputes.

    Args:
        ffn: unused.
        parts: E routed experts; the keys are the first I rows of `up_EGD`.
        spec: ``router.bias``.
        generator: unused.
        data: unused.

    Returns:
        ``weight`` [E, D] and, if ``router.bias``, ``bias`` of zeros [E]; float32.

    Source:
        Qiu et al., "Emergent Mixture-of-Experts" (EMoE), 2023, https://arxiv.org/abs/2310.10908
    """
    experts = parts.experts
    width = experts.neuron_EI.shape[1]
    key_EID = experts.up_EGD[:, :width].float()
    count_E1 = (experts.neuron_EI >= 0).sum(1, keepdim=True).to(key_EID.device)
    return linear(key_EID.sum(1) / count_E1, spec)


def _no_tied_nulls(router: Router) -> str | None:
    if not router.tied or router.select != "null":
        return None
    return "a tied router has no rows for null experts; leave `router.tied` out"


AVG_KEY = RouterMethod(
    name="avg_key",
    build=avg_key,
    kinds=frozenset({"split", "subsets"}),
    otherwise="averages the keys of each expert, and copies would all get the same row; "
    "use `router.method: normal` or `virtual_group`, or an expert method that splits",
    paper='Qiu et al., "EMoE", 2023',
    source="https://arxiv.org/abs/2310.10908",
    reads=frozenset({"tied"}),
    limits=(_no_tied_nulls,),
)
