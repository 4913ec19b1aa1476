"""What kind each torch operation is, for the walk of `demand` and the checks of `region`."""

LAYOUT = {
    "alias", "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "flip",
    "getitem", "mT", "movedim", "narrow", "permute", "reshape", "reshape_as", "roll", "select",
    "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "T", "tensor_split",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip
# Of them, the ones that read the shape of a second tensor.
SHAPED_LIKE = {"expand_as", "reshape_as", "view_as"}
JOINS = {"cat", "concat", "concatenate", "stack"}
# Of the layout operations, those that leave every element at its place in the flat order.
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
