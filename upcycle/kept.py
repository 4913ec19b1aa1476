"""What stays of a linear map of which only a part belongs to an FFN.

One projection may give queries, keys, values and the FFN's rows (ViT-22B, PaLM), and one may map
the attention's output beside the hidden tensor. The rest keeps computing what it did: it is stored
once, as a smaller matrix ``[out, in]``, under the name that `FFN.kept` tells.
"""

from collections.abc import Mapping

import torch

from upcycle.ffn import Kept


def read_kept(kept: Kept, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The numbers that stay of one parameter, in new memory: [R, in], [out, C] or [R]."""
    stored = _as_rows(kept, parameters[kept.parameter].detach())
    stays = stored[_stays(kept, len(stored))]
    return stays.t().contiguous() if kept.columns else stays


@torch.no_grad()
def write_kept(kept: Kept, parameters: Mapping[str, torch.Tensor], numbers: torch.Tensor) -> None:
    """The inverse of `read_kept`, into the dense parameter."""
    stored = _as_rows(kept, parameters[kept.parameter])
    stored[_stays(kept, len(stored))] = numbers.t() if kept.columns else numbers


def _as_rows(kept: Kept, stored: torch.Tensor) -> torch.Tensor:
    """A view in which each row stays or goes."""
    if stored.dim() == 1:
        return stored
    stored = (stored.t() if kept.transposed else stored).flatten(1)
    return stored.t() if kept.columns else stored


def _stays(kept: Kept, size: int) -> torch.Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    for start, stop in kept.taken:
        stays[start:stop] = False
    return stays
