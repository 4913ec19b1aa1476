"""Domains of texts that have no names.

Shape suffixes: N sequences, T tokens of all of them, V tokens of the vocabulary that occur, R
directions.
"""

from collections.abc import Sequence

import torch

from upcycle.errors import UsageError
from upcycle.passes.experts.balanced import balanced_clusters
from upcycle.passes.experts.split import group_sizes


def text_domains(
    ids: Sequence[Sequence[int]], count: int, generator: torch.Generator
) -> torch.Tensor:
    """`count` groups of sequences of similar words: TF-IDF, its first directions, and k-means.

    The sizes of the groups differ by at most one sequence. `generator` draws the first centres.
    Returns the group of each sequence, int64 [N]. Memory: [N, V] float64.

    Raises:
        UsageError: there are fewer sequences than groups.
    """
    if len(ids) < count:
        raise UsageError(
            f"`calibration`: {len(ids)} sequences cannot be grouped into {count} domains; give "
            "more data, or a shorter `calibration.length`"
        )
    flat_T = torch.tensor([i for row in ids for i in row])
    _, flat = flat_T.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    row_T = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(r) for r in ids]))
    count_NV = torch.zeros(len(ids), int(flat.max()) + 1, dtype=torch.float64)
    count_NV.index_put_((row_T, flat), torch.ones(len(flat), dtype=torch.float64), accumulate=True)
    rare_V = (len(ids) / (count_NV > 0).sum(0)).log() + 1
    weight_NV = torch.nn.functional.normalize(count_NV * rare_V)
    values_N, vectors_NN = torch.linalg.eigh(weight_NV @ weight_NV.t())
    directions = min(len(ids), 8 * count)
    features_NR = vectors_NN[:, -directions:] * values_N[-directions:].clamp(min=0).sqrt()
    return balanced_clusters(features_NR, group_sizes(len(ids), count), generator=generator)
