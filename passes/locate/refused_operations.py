"""Why an operation is refused between the linear maps of an FFN."""

from typing import Any

import torch
from torch import fx

from upcycle.capture.recorder import op_name
from upcycle.passes.locate.hidden_tensor import NearMissError

ELEMENTS = 2**22  # of an input that is worth trying
TRIES = 5


def why_opaque(node: fx.Node, data: fx.Node | None = None) -> str:
    """Why an operation that is not known to be pointwise is refused.

    An operation that makes of the tensor `data` one of the same shape is tried out.
    """
    name = op_name(node.target)
    if name != "batch_norm":
        moves = None if data is None else _moves_others(node, data)
        if moves is None:
            return f"`{name}` is not known to be pointwise"
        if moves:
            return f"`{name}` is not pointwise: an element that was moved moved others"
        return (
            f"`{name}` seems to be pointwise, but no converted model could store it: write it with "
            "the operations of `upcycle.pointwise.OPS`, or add it with "
            "`upcycle.register_activation`"
        )
    training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
    if training:
        return "`batch_norm` normalises over the batch in training: call `eval()` and fold it first"
    return (
        "`batch_norm` scales each neuron by numbers of its own: fold it into the map before it "
        "first, as torch.nn.utils.fusion does"
    )


def why_not_linear(node: fx.Node) -> str:
    """Why a convolution is not a linear map of the channels of one position."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    name = op_name(node.target)
    if isinstance(weight, fx.Node) and all(size == 1 for size in weight.meta["shape"][2:]):
        return (
            f"`{name}` has groups, a stride or padding: as one matrix its groups would be mostly "
            "zeros; write them as one convolution without groups if that is wanted"
        )
    return f"`{name}` has a kernel larger than one"


def elu_of_aten(
    node: fx.Node, x: Any, alpha: float, scale: float, inner: float = 1.0
) -> tuple[str, list[Any], float]:
    """The operation, its arguments and the factor that ATen's ELU is, as SELU and CELU become one.

    Raises:
        NearMissError: it is none that is known here.
    """
    if inner == 1:
        return "elu", [x, alpha], scale
    if alpha * inner != 1:
        raise NearMissError("`elu` has a scale inside that no activation here has", node)
    return "celu", [x, alpha], scale


def _moves_others(node: fx.Node, data: fx.Node) -> bool | None:
    """Whether an element of `data` moves other elements of what `node` makes; None if unknown.

    The recorded call is run on random numbers of the recorded shapes, on the CPU. That another
    element moves is a proof; that none does is a strong hint only.
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
    except Exception:  # any operation, called outside its model, may fail in any way
        return None
    return False


def _differ(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ~((x == y) | (x.isnan() & y.isnan()))
