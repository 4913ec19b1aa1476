"""The activations that have a name: one table, from which every other list of them is derived.

To add an activation, add its row. A row with a number has code in ``cpp/activations.h`` and
``triton/source.py``, too.
"""

from typing import Any, NamedTuple

from torch import nn
from transformers.integrations import moe as _interface

from upcycle.pointwise import Pointwise, Step


class NamedActivation(NamedTuple):
    """A function a, and what it is the gate of: ``a(z_0) * z_1``.

    Attributes:
        name: of the function.
        steps: one way to compute it from ``z0``.
        gated: name of the product with ``z1``, if that has one.
        kernel: its number in upcycle's own kernels, with a gate and without, if they have it.
        onnx: its name in the nodes ``MoE`` and ``QMoE`` of ONNX Runtime, if they have it.
        onnx_gated: that of the product.
        classes: names of the classes of torch and transformers that compute it.
        degree: d, if ``a(c z) = c^d a(z)`` for every c > 0.
    """

    name: str
    steps: tuple[Step, ...]
    gated: str | None = None
    kernel: int | None = None
    onnx: str | None = None
    onnx_gated: str | None = None
    classes: tuple[str, ...] = ()
    degree: int | None = None

    def forms(self) -> tuple[Pointwise, ...]:
        """The function, and its product with ``z1`` if that has a name."""
        plain = Pointwise(1, self.steps, self.name)
        if self.gated is None:
            return (plain,)
        product: Step = ("mul", (f"t{len(self.steps) - 1}", "z1"), {})
        return plain, Pointwise(2, (*self.steps, product), self.gated)


def _row(name: str, *steps: Step, **more: Any) -> NamedActivation:
    return NamedActivation(name, steps or ((name, ("z0",), {}),), **more)


NAMED_ACTIVATIONS = (
    _row(
        "none", ("mul", ("z0", 1.0), {}), gated="bilinear", kernel=0, onnx="identity",
        classes=("LinearActivation",), degree=1
    ),
    _row("relu", gated="reglu", kernel=1, onnx="relu", classes=("ReLU",), degree=1),
    _row(
        "relu2", ("relu", ("z0",), {}), ("square", ("t0",), {}), kernel=2,
        classes=("ReLUSquaredActivation",), degree=2
    ),
    _row(
        "silu", gated="swiglu", kernel=3, onnx="silu", onnx_gated="swiglu",
        classes=("SiLU", "SiLUActivation")
    ),
    _row("gelu", gated="geglu", kernel=4, classes=("GELUActivation",)),
    _row(  # the "gelu" of ONNX Runtime, 3e-4 from the erf form
        "gelu_tanh", ("gelu", ("z0",), {"approximate": "tanh"}), gated="geglu_tanh", kernel=5,
        onnx="gelu", classes=("FastGELUActivation", "GELUTanh", "NewGELUActivation")
    ),
    _row(
        "quick_gelu",
        ("mul", ("z0", 1.702), {}), ("sigmoid", ("t0",), {}), ("mul", ("z0", "t1"), {})
    ),
    _row("sigmoid", gated="sigmoid_glu"),
    _row("tanh"),
    _row("elu"),
    _row("leaky_relu", degree=1),
    _row("hardswish"),
    _row("mish"),
)  # fmt: skip
NAMED_POINTWISE = {form.name: form for row in NAMED_ACTIVATIONS for form in row.forms()}
_IN_KERNELS = {
    (form.name, form.arity): row.name
    for row in NAMED_ACTIVATIONS
    for form in row.forms()
    if row.kernel is not None
}
_OF_CLASS = {name: row.name for row in NAMED_ACTIVATIONS for name in row.classes}


def of_pointwise(name: str, arity: int) -> str | None:
    """The activation of a `Pointwise` of that name, for a product that of the gate; None if the
    kernels do not have it."""
    return _IN_KERNELS.get((name, arity))


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
