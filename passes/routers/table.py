"""Routers that look up the experts of a token: by a hash of its id, or as assigned."""

from dataclasses import replace
from typing import Any

import torch

from upcycle.ir.ffn import FFN
from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.method import ALL_KINDS, RouterMethod, no_bias, no_nulls
from upcycle.recipe.schema import Router


def hash_ids(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Draw K distinct experts for every row of a table, as evenly as rows can be.

    Each run of E rows has every expert K times. A token with the id i reads row ``i mod entries``.

    Returns:
        ``expert`` [entries, K] int64.

    Source:
        Roller et al., "Hash Layers for Large Sparse Models", 2021, https://arxiv.org/abs/2106.04426
    """
    spec = dense.spec
    entries, count, k = spec.router.entries, spec.num_experts, spec.top_k
    runs = -(-entries // count)
    # A random order of the experts for each run, read from E places on: a Latin square.
    order_RE = torch.rand(runs, count, generator=dense.generator).argsort(-1)
    start_E = torch.arange(count)[:, None] + torch.arange(k)
    return {"expert": order_RE[:, start_E % count].reshape(-1, k)[:entries]}


def assigned(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Give row i of the table the experts i, i + 1, ..., i + K - 1, in a circle.

    With ``by: domain`` text of domain i goes to expert i, with ``by: type`` tokens of type i.

    Returns:
        ``expert`` [entries, K] int64.

    Source:
        Gururangan et al., "DEMix Layers", 2021, https://arxiv.org/abs/2108.05036
    """
    row_N1 = torch.arange(dense.spec.router.entries)[:, None]
    return {"expert": (row_N1 + torch.arange(dense.spec.top_k)) % dense.spec.num_experts}


def _facts(router: Router, ffn: FFN, num_experts: int) -> dict[str, Any]:
    return {"entries": router.entries, "by": router.by}


def _no_scores(router: Router) -> str | None:
    if router.select == "top_k" and not router.balance:
        return None
    return (
        f"`method: {router.method}` gives every token its `top_k` experts; leave "
        "`router.select` and `router.balance` out"
    )


HASH = RouterMethod(
    name="hash",
    build=hash_ids,
    kinds=ALL_KINDS - {"slices"},
    otherwise="draws experts and not copies; leave `experts.granularity` out with "
    "`experts.method: copy`",
    makes="table",
    facts=_facts,
    reads=frozenset({"by", "entries"}),
    limits=(no_nulls, no_bias, _no_scores),
)
ASSIGNED = replace(
    HASH,
    name="assigned",
    build=assigned,
    otherwise="assigns experts and not copies; use `experts.method: copy`",
)
