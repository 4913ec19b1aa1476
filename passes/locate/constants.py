"""Numbers in a model's code that are no weights, and why an operation is none of an FFN's."""

from typing import Any

import torch
from torch import fx

from upcycle.capture.recorder import op_name
from upcycle.passes.locate.operations import FILLS
from upcycle.passes.locate.probe import moves_others
from upcycle.pointwise import OPS


def filled_with(node: fx.Node) -> float | None:
    """The number that every element of what `node` makes is, if that is known without running."""
    name = op_name(node.target)
    if name not in FILLS:
        return None
    if name.startswith(("zeros", "ones")):
        return float(name.startswith("ones"))
    key = {"full": "fill_value", "full_like": "fill_value"}.get(name, "data")
    position = 1 if key == "fill_value" else 0
    number = node.args[position] if len(node.args) > position else node.kwargs.get(key)
    return float(number) if isinstance(number, int | float) else None


def number_of(op: str, args: tuple[Any, ...]) -> float:
    """What a pointwise operation makes of numbers; one where it is none, as that is refused."""
    if op not in OPS or not all(isinstance(arg, int | float) for arg in args):
        return 1.0
    return float(OPS[op](*(torch.tensor(arg, dtype=torch.float64) for arg in args)))


def why_opaque(node: fx.Node, data: fx.Node | None = None) -> str:
    """Why an operation that is not known to be pointwise is refused.

    Where it makes of the tensor `data` one of the same shape, it is tried out.
    """
    name = op_name(node.target)
    if name != "batch_norm":
        moves = None if data is None else moves_others(node, data)
        if moves is None:
            return f"`{name}` is not known to be pointwise"
        if moves:
            return f"`{name}` is not pointwise: an element that was moved moved others"
        return (
            f"`{name}` seems to be pointwise, but no converted model could store it: write it with "
            "the operations of `upcycle.pointwise.OPS`"
        )
    training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
    if training:
        return "`batch_norm` normalises over the batch in training: call `eval()` and fold it first"
    return (
        "`batch_norm` scales each neuron by numbers of its own: fold it into the map before it "
        "first, as torch.nn.utils.fusion does"
    )


def why_not_linear(node: fx.Node) -> str:
    """Why a convolution is no linear map of the channels of one position."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    name = op_name(node.target)
    if isinstance(weight, fx.Node) and all(size == 1 for size in weight.meta["shape"][2:]):
        return (
            f"`{name}` has groups, a stride or padding: as one matrix its groups would be mostly "
            "zeros; write them as one convolution without groups if that is wanted"
        )
    return f"`{name}` has a kernel larger than one"
