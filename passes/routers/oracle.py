"""A router that looks at what every expert would add."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import RouterMethod, no_bias, no_nulls
from upcycle.recipe.schema import Router


def oracle(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Make nothing: the runtime router reads the experts of its layer.

    It runs them all to rank them by the length of what they add, so it saves nothing. It shows what
    the experts allow, whatever the router.

    Returns:
        No tensor.

    Source:
        Zhang et al., "MoEfication", 2021, section 3.2, https://arxiv.org/abs/2110.01786
    """
    return {}


def _no_probabilities(router: Router) -> str | None:
    if (router.select, router.weights) == ("top_k", "one"):
        return None
    return "`method: oracle` ranks what experts add; set `select: top_k` and `weights: one`"


ORACLE = RouterMethod(
    name="oracle",
    build=oracle,
    kinds=frozenset({"split", "subsets"}),
    otherwise="ranks parts of an FFN by what they add, and copies all add the same; "
    "use an expert method that splits",
    makes="oracle",
    limits=(no_nulls, no_bias, _no_probabilities),
)
