"""An expert is scored by the mean pre-activation of its neurons."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, linear
from upcycle.recipe.schema import Router


def avg_key(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Make each router row the mean of the expert's keys: the rows that the activation reads.

    The logit of an expert is then the mean pre-activation of its neurons (their biases not
    counted). It is what `upcycle.layers.moe.MoE.tie_router` recomputes.

    Source:
        Qiu et al., "Emergent Mixture-of-Experts" (EMoE), 2023, https://arxiv.org/abs/2310.10908
    """
    return linear(mean_of(keys(parts), parts), dense.spec)


def keys(parts: Parts) -> torch.Tensor:
    """The row of each neuron of each expert that the activation reads, [E, I, D] float32."""
    return parts.experts.up_EGD[:, : parts.experts.neuron_EI.shape[1]].float()


def mean_of(key_EID: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The mean over the neurons of each expert, [E, D]; padding is not counted."""
    count_E1 = (parts.experts.neuron_EI >= 0).sum(1, keepdim=True).to(key_EID.device)
    return key_EID.sum(1) / count_E1


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
    reads=frozenset({"tied"}),
    limits=(_no_tied_nulls,),
)
