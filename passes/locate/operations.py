"""What kind each torch operation is, for the walk of `trace` and the checks of `region`."""

from typing import Any

import torch
from torch import fx

from upcycle.capture.recorder import op_name
from upcycle.pointwise import OPS

LAYOUT = {
    "alias", "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "flip",
    "getitem", "mT", "movedim", "narrow", "permute", "reshape", "reshape_as", "roll", "select",
    "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "T",
    "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip
# Layout operations that read the shape of a second tensor.
SHAPED_LIKE = {"expand_as", "reshape_as", "view_as"}
JOINS = {"cat", "concat", "concatenate", "stack"}
# Layout operations that leave every element at its place in the flat order.
KEEPS_ORDER = {
    "alias", "clone", "contiguous", "detach", "flatten", "reshape", "reshape_as", "squeeze",
    "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip
CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "type"}
# Pointwise operations on truth values, which a program holds as ones and zeros.
TRUTH = {
    "ge": "ge", "greater": "gt", "greater_equal": "ge", "gt": "gt", "le": "le", "less": "lt",
    "less_equal": "le", "lt": "lt", "and": "logical_and", "bitwise_and": "logical_and",
    "logical_and": "logical_and", "or": "logical_or", "bitwise_or": "logical_or",
    "logical_or": "logical_or", "invert": "logical_not", "bitwise_not": "logical_not",
    "logical_not": "logical_not",
}  # fmt: skip
# Operations that fill a tensor with one number.
FILLS = {"full", "full_like", "ones", "ones_like", "scalar_tensor", "tensor", "zeros", "zeros_like"}
# Reductions that are pointwise if they are given two tensors.
OF_TWO = {"max": "maximum", "min": "minimum"}
# Operations that mix the hidden axis.
NONLINEAR_MIXERS = {"softmax", "log_softmax", "softmin", "topk", "sort", "cummax"}
# The same, but a pair of linear maps around one is still linear, up to a factor for each token.
SCALING_MIXERS = {
    "amax", "cumsum", "group_norm", "instance_norm", "layer_norm", "linalg_vector_norm",
    "local_response_norm", "logsumexp", "max", "mean", "norm", "normalize", "rms_norm", "std",
    "sum", "var",
}  # fmt: skip
# Not pointwise for the analysis, but affine: a pair of linear maps around one is no FFN.
AFFINE = {"batch_norm", "pad"}
# These may have a positional flag that says to work in place.
INPLACE = {
    "celu", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6",
    "selu", "silu", "threshold",
}  # fmt: skip
# A program of these alone is linear in its expansions; so is one that multiplies by a number.
LINEAR = {"add", "sub", "rsub", "neg", "cast", "cast_like"}


def filled_with(node: fx.Node) -> float | None:
    """The number that fills the result of `node`, if that is known without running it."""
    name = op_name(node.target)
    if name not in FILLS:
        return None
    if name.startswith(("zeros", "ones")):
        return float(name.startswith("ones"))
    key, position = ("fill_value", 1) if name.startswith("full") else ("data", 0)
    number = node.args[position] if len(node.args) > position else node.kwargs.get(key)
    return float(number) if isinstance(number, int | float) else None


def number_of(op: str, args: tuple[Any, ...]) -> float:
    """The value of a pointwise operation on numbers; 1 for any other, which is refused anyway."""
    if op not in OPS or not all(isinstance(arg, int | float) for arg in args):
        return 1.0
    return float(OPS[op](*(torch.tensor(arg, dtype=torch.float64) for arg in args)))
