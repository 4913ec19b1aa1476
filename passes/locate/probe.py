"""Try an operation that no rule knows: move one element of its input, see which outputs move."""

from typing import Any

import torch
from torch import fx

ELEMENTS = 2**22  # of an input that is worth trying
TRIES = 5


def moves_others(node: fx.Node, data: fx.Node) -> bool | None:
    """Whether an element of `data` moves other elements of what `node` makes; None if unknown.

    The recorded call is run on random numbers of the recorded shapes, on the CPU. That no other
    element moved is a strong hint and no proof; that one did is a proof.
    """
    shapes = [source.meta["shape"] for source in node.all_input_nodes]
    if any(torch.Size(shape).numel() > ELEMENTS for shape in shapes) or not callable(node.target):
        return None
    generator = torch.Generator().manual_seed(0)
    feeds = {
        source: torch.randn(source.meta["shape"], generator=generator).to(source.meta["dtype"])
        for source in node.all_input_nodes
    }

    def run(values: torch.Tensor) -> torch.Tensor:
        inputs = {source: tensor.clone() for source, tensor in feeds.items()} | {data: values}
        target: Any = node.target
        args: Any = fx.node.map_arg(node.args, inputs.__getitem__)
        out: torch.Tensor = target(*args, **fx.node.map_arg(node.kwargs, inputs.__getitem__))
        return out.reshape(-1)

    try:
        with torch.random.fork_rng(devices=[]):
            before = run(feeds[data].clone())
            if before.numel() != feeds[data].numel():
                return None
            if _differ(run(feeds[data].clone()), before).any():
                return None  # it draws random numbers
            for place in torch.randint(before.numel(), (TRIES,), generator=generator).tolist():
                moved = feeds[data].clone()
                moved.view(-1)[place] += 1.5
                changed = _differ(run(moved), before)
                changed[place] = False
                if changed.any():
                    return True
    except Exception:  # an operation of anybody, called outside its model, may fail in any way
        return None
    return False


def _differ(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ~((x == y) | (x.isnan() & y.isnan()))
