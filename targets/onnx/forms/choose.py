"""Which ONNX nodes an MoE layer becomes.

``com.microsoft::MoE`` is one kernel in ONNX Runtime, for five activations. An activation is
recognised by its values and not by its name, so that one spelled out in many steps is found too.
"""

from dataclasses import dataclass, replace

from upcycle.ir.same_function import same_function
from upcycle.kernels.activations import NAMED_ACTIVATIONS, NAMED_POINTWISE
from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Form, Onnx
from upcycle.targets.onnx.forms.cost_model import Work, seconds
from upcycle.targets.onnx.forms.routed import Routed


@dataclass(frozen=True)
class Kernel:
    """The fused node: its `activation_type`, and whether the rows of gate and up alternate."""

    activation: str
    gated: bool = False


# The first release of ONNX Runtime whose kernel for CUDA computes SwiGLU as the node says.
CUDA_SWIGLU = (1, 28)


def needs_new_cuda(activation: Pointwise, options: Onnx) -> bool:
    """Whether a file for CUDA has a node for this activation that `CUDA_SWIGLU` is about."""
    has_node = options.profile == "cuda" and options.form not in ("unrolled", "dense")
    return has_node and same_function(activation, NAMED_POINTWISE["swiglu"])


@dataclass(frozen=True)
class Choice:
    """What a layer becomes: `form`, or in calls of `limit` tokens or more `longer`.

    Attributes:
        pointwise: what the experts compute: as the layer says, or the kernel's form of GELU.
        kernel: the node behind a form that is fused or quantised.
        bits: of a weight of the experts, if they are rounded.
    """

    form: Form
    pointwise: Pointwise
    kernel: Kernel | None = None
    longer: Form | None = None
    limit: int = 0
    bits: int | None = None

    @property
    def forms(self) -> tuple[Form, ...]:
        """One or two."""
        return (self.form,) if self.longer is None else (self.form, self.longer)


KERNELS = tuple(
    (Kernel(name, gated=form.arity == 2), form)
    for row in NAMED_ACTIVATIONS
    for form, name in zip(row.forms(), (row.onnx, row.onnx_gated), strict=False)
    if name is not None
)


def kernel_named(activation: str) -> tuple[Kernel, Pointwise]:
    """The entry of `KERNELS` with this `activation_type`."""
    return next(pair for pair in KERNELS if pair[0].activation == activation)


def choose(layer: Routed, options: Onnx) -> Choice:
    """The forms of `layer` under `options`.

    What the kernels do not compute becomes standard operations under every option; rounded experts
    then have 8 bits.
    """
    own = layer.experts.act_fn.pointwise
    kernel = fused_form(layer, gelu=options.gelu)
    widths = (layer.experts.hidden_dim, layer.experts.intermediate_dim)
    fills_bytes = options.bits == 8 or all(width % 2 == 0 for width in widths)
    asked: Form | None = None if options.form == "auto" else options.form
    if asked is None and options.profile == "portable":
        asked = "unrolled"
    if asked is None and options.rounds:  # unpacked they are unrolled, which is faster
        asked = "unrolled" if options.unpacks and options.bits == 8 else "quantised"
    if asked is None and options.profile == "cuda":
        asked = "fused"
    has_node = kernel is not None and (fills_bytes or asked != "quantised")
    if asked in ("fused", "quantised") and not has_node:
        asked = "unrolled"
    made = Choice(asked, own) if asked else _fastest(layer, kernel, options)
    if options.rounds:
        made = replace(made, bits=options.bits if asked == "quantised" else 8)
    if kernel is None or not {"fused", "quantised"} & set(made.forms):
        return made
    program = dict(KERNELS)[kernel]
    return replace(made, kernel=kernel, pointwise=own if same_function(own, program) else program)


def _fastest(layer: Routed, kernel: Kernel | None, options: Onnx) -> Choice:
    """The fastest exact form, or one for short and one for long calls."""
    experts, own = layer.experts, layer.experts.act_fn.pointwise
    forms: list[Form] = ["unrolled", "dense"]
    if kernel is not None:
        forms.append("fused")
    one_token = Work(
        tokens=1,
        num_experts=experts.num_experts,
        top_k=layer.top_k,
        d_model=experts.hidden_dim,
        width=experts.intermediate_dim,
        arity=own.arity,
        gelu=any(op == "gelu" for op, _, _ in own.steps),
    )

    def cost(form: Form, tokens: int) -> float:
        return seconds(form, replace(one_token, tokens=tokens))

    few, *more = options.calls
    form = min(forms, key=lambda form: cost(form, few))
    many = more[0] if more else few
    longer = min(forms, key=lambda form: cost(form, many))
    if longer == form:
        return Choice(form, own)
    limit = few + 1
    while cost(longer, limit) > cost(form, limit):
        limit += 1
    return Choice(form, own, longer=longer, limit=limit)


def fused_form(layer: Routed, *, gelu: str = "exact") -> Kernel | None:
    """The fused node that computes `layer`, or None; with ``tanh`` its GELU may stand for erf."""
    pointwise = layer.experts.act_fn.pointwise
    if layer.has_signs:
        return None  # the kernel takes logarithms of the weights
    if pointwise.arity > 2 or layer.experts.hidden_dim != layer.experts.down_proj.shape[1]:
        return None
    for form, program in KERNELS:
        if same_function(pointwise, program):
            return form
    if gelu == "tanh" and same_function(pointwise, NAMED_POINTWISE["gelu"]):
        return Kernel("gelu")
    return None
