"""Every expert is the FFN of another model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from upcycle.ir.ffn import FFN
from upcycle.ir.weights import gather_experts, tensors_of
from upcycle.passes.experts.method import DenseLayer, ExpertMethod, Parts
from upcycle.recipe.schema import Recipe


def from_checkpoints(dense: DenseLayer) -> Parts:
    """Take the experts from the same FFN of several models, in their order, equally many of each.

    Approximate; exact if all sources are equal and the weights of a token sum to one. A layer that
    is forced to the expert of one source is the FFN of that source, its output bias included.

    Returns:
        E experts of width F, E being a multiple of the number of sources; the origins are the
        neurons of their sources. Memory: twice E times the dense FFN.

    Source:
        Sukhbaatar et al., "Branch-Train-MiX", 2024, https://arxiv.org/abs/2403.07816
    """
    neuron_1F = torch.arange(dense.d_ff)[None]
    each = [gather_experts(source, neuron_1F) for source in dense.ffn.sources]
    chosen = [tensors_of(each[source]) for source in dense.spec.source_E]
    stacked: dict[str, Any] = {name: torch.cat([one[name] for one in chosen]) for name in chosen[0]}
    return Parts(replace(each[0], **stacked))


def _refuse(ffn: FFN, recipe: Recipe) -> Iterator[str]:
    experts, count = recipe.experts, len(recipe.experts.sources)
    if not count:
        yield "there are no models to take experts from; set `experts.sources: [base, ...]`"
        return
    if experts.count % count:
        yield (
            f"{count} sources cannot give {experts.count} experts, the same number each; "
            f"set `experts.count` to {count}"
        )
    if isinstance(experts.merge, int) and not 0 <= experts.merge < count:
        yield f"there is no source {experts.merge}; set `experts.merge` to a number below {count}"


FROM_CHECKPOINTS = ExpertMethod(
    name="from_checkpoints",
    kind="altered",
    build=from_checkpoints,
    has_sources=True,
    refuse=_refuse,
)
