"""A converted model with the numbers that a native checkpoint holds, for files that share them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from upcycle.moe import MoE
from upcycle.spec import MoESpec
from upcycle.targets.native.architecture import NativeTarget
from upcycle.targets.native.tensors import fold_of


@contextmanager
def as_on_disk(
    layers: Iterable[tuple[MoESpec, MoE]], target: NativeTarget | None
) -> Iterator[None]:
    """Within it the down projections are those of the checkpoint, and the routers make up for it.

    The layers compute what they did, up to rounding. Memory: the scaled projections of all layers.

    Args:
        layers: each with its spec; changed in place, and restored.
        target: the architecture that was written, or None if none was.
    """
    saved: list[tuple[MoE, torch.Tensor, float]] = []
    try:
        for spec, layer in layers if target is not None else ():
            assert target is not None
            down, factor = layer.experts.down_proj, fold_of(target, spec).down
            if factor in (0, 1):
                continue
            saved.append((layer, down.data, layer.router.scale))
            wide = down.data.to(torch.promote_types(down.dtype, torch.float32))
            down.data = (wide * factor).to(down.dtype)
            layer.router.scale /= factor
        yield
    finally:
        for layer, before, scale in saved:
            layer.experts.down_proj.data = before
            layer.router.scale = scale
