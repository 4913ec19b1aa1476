"""Names of the activations that compiled kernels have."""

from typing import Any

from torch import nn
from transformers.integrations import moe as _interface

# By class, of transformers and torch.
_OF_CLASS = {
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "LinearActivation": "none",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
# By the name of a `Pointwise`; with a gate the activation is that of the gate.
_PLAIN = {name: name for name in ("gelu", "gelu_tanh", "relu", "relu2", "silu")}
_GATED = {
    "bilinear": "none",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "swiglu": "silu",
}


def of_pointwise(name: str, arity: int) -> str | None:
    """The activation of a `Pointwise` with that name, None if kernels do not know it."""
    return (_PLAIN if arity == 1 else _GATED).get(name)


def of_module(module: Any) -> str | None:
    """The activation of a module with the experts interface of transformers, None if unknown.

    Gate and value are the halves of what is expanded, in this order, or it is unknown.
    """
    act: Any = getattr(module, "act_fn", None)
    pointwise = getattr(act, "pointwise", None)
    if pointwise is not None:  # an `upcycle.layers.experts.Experts`
        if module.training and act.dropout:
            return None
        return of_pointwise(pointwise.name, pointwise.arity)
    if module.has_gate:
        default = _interface._default_apply_gate
        is_concatenated = getattr(module, "is_concatenated", True)
        if not is_concatenated or getattr(type(module), "_apply_gate", default) is not default:
            return None
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _OF_CLASS.get(type(act).__name__)
