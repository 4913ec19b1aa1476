"""What stays of a linear map of which only a part belongs to an FFN.

One projection may give queries, keys, values and the FFN's rows (ViT-22B, PaLM), and one may map
the attention's output beside the hidden tensor. The rest keeps computing what it did: it is stored
once, as a smaller matrix ``[out, in]``, under the name in `FFN.kept`.
"""

from collections.abc import Iterator, Mapping

import torch

from upcycle.ir.ffn import Kept
from upcycle.ir.weights import as_matrix


def read_kept(kept: Kept, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The numbers that stay of one parameter, in new memory: [R, in], [out, C] or [R]."""
    stored = _as_rows(kept, parameters[kept.parameter].detach())
    stays = torch.cat([stored[start:stop] for start, stop in _stay(kept, len(stored))])
    return stays.t().contiguous() if kept.columns else stays


@torch.no_grad()
def write_kept(kept: Kept, parameters: Mapping[str, torch.Tensor], numbers: torch.Tensor) -> None:
    """The inverse of `read_kept`, into the dense parameter."""
    stored = _as_rows(kept, parameters[kept.parameter])
    rows, done = numbers.t() if kept.columns else numbers, 0
    for start, stop in _stay(kept, len(stored)):
        stored[start:stop] = rows[done : done + stop - start]
        done += stop - start


def _as_rows(kept: Kept, stored: torch.Tensor) -> torch.Tensor:
    """A view in which each row stays or goes."""
    if stored.dim() == 1:
        return stored
    stored = as_matrix(stored, transposed=kept.transposed)
    return stored.t() if kept.columns else stored


def _stay(kept: Kept, size: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of what lies between the taken parts."""
    ends = [0, *(stop for _, stop in kept.taken)]
    return zip(ends, [*(start for start, _ in kept.taken), size], strict=True)
