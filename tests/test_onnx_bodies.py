"""Every function that an ONNX file can have, in the reference evaluator of onnx.

Shape suffixes: T tokens, D d_model, E experts, I expert width, G = arity * I.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_case import ACTIVATIONS
from test_onnx_programs import OPTIONS, PLAIN, POSITIVE
from torch import Tensor

from upcycle.pointwise import Pointwise
from upcycle.recipe.onnx import Form
from upcycle.targets.onnx.forms import functions as bodies
from upcycle.targets.onnx.forms.activation import OPERATIONS
from upcycle.verification.onnx.rounding import weighted_sum

T, D, WIDTH = 9, 6, 5
# As `test_onnx_forms` allows; of float16, 2^-11 for each of the numbers that are added.
CLOSE = {np.float32: 1e-5, np.float16: 12 * 2**-11}
TYPES = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}
KERNELS = {"relu": "relu", "silu": "silu", "gelu": "gelu_tanh", "swiglu": "swiglu"}
IDENTITY = Pointwise(1, (("mul", ("z0", 1.0), {}),), "identity")


@dataclass(frozen=True)
class Layer:
    """The inputs of a function, and the weights that each token gives its experts."""

    pointwise: Pointwise
    x_TD: Tensor
    scores_TE: Tensor
    up_EGD: Tensor
    bias_EG: Tensor | None
    down_EDI: Tensor
    k: int

    def weights_TE(self) -> Tensor:
        best = self.scores_TE.double().softmax(-1).topk(self.k)
        shares_TK = best.values / best.values.sum(-1, keepdim=True)
        return torch.zeros(self.scores_TE.shape).double().scatter(1, best.indices, shares_TK)

    def exact(self, weights_TE: Tensor) -> Tensor:
        bias = None if self.bias_EG is None else self.bias_EG.double()
        x, up, down = self.x_TD.double(), self.up_EGD.double(), self.down_EDI.double()
        return weighted_sum(self.pointwise, up, bias, down, x, weights_TE)


def layer_of(pointwise: Pointwise, num_experts: int, k: int, *, bias: bool) -> Layer:
    draw = torch.Generator().manual_seed(num_experts + k)
    rows = pointwise.arity * WIDTH

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).half().float()  # the same numbers in both types

    bias_EG = drawn(num_experts, rows) if bias else None
    up_EGD, down_EDI = drawn(num_experts, rows, D) / 2, drawn(num_experts, D, WIDTH)
    return Layer(pointwise, drawn(T, D), drawn(T, num_experts), up_EGD, bias_EG, down_EDI, k)


def run(
    function: ir.Function, feeds: list[Tensor | None], dtype: type, **attributes: int | str
) -> Tensor:
    """A model of one node, which calls `function`."""
    inputs = [None if x is None else ir.Value(name=f"in_{i}") for i, x in enumerate(feeds)]
    for value, x in zip(inputs, feeds, strict=True):
        if value is not None and x is not None:
            value.type, value.shape = ir.TensorType(TYPES[dtype]), ir.Shape(x.shape)
    out = ir.Value(name="y", type=ir.TensorType(TYPES[dtype]), shape=ir.Shape([None, None]))
    attrs = [ir.convenience.convert_attribute(name, v) for name, v in attributes.items()]
    node = ir.Node(function.domain, function.name, inputs, attrs, outputs=[out])
    imports = {"": 21, function.domain: 1}
    given = [value for value in inputs if value is not None]
    graph = ir.Graph(given, [out], nodes=[node], opset_imports=imports, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    onnx.checker.check_model(model)
    arrays = {f"in_{i}": x.numpy().astype(dtype) for i, x in enumerate(feeds) if x is not None}
    (y,) = ReferenceEvaluator(model).run(None, arrays)
    assert y.dtype == dtype
    return torch.from_numpy(np.asarray(y)).double()


def run_standard(form: Form, layer: Layer, weights_TE: Tensor, dtype: type) -> Tensor:
    count, has_bias = len(layer.up_EGD), layer.bias_EG is not None
    function = bodies.standard(
        form, "MoE_x", layer.pointwise, count, bias=has_bias, dtype=TYPES[dtype]
    )
    bias = [] if layer.bias_EG is None else [layer.bias_EG]
    return run(function, [layer.x_TD, weights_TE, layer.up_EGD, *bias, layer.down_EDI], dtype)


def run_fused(layer: Layer, name: str, among: list[str], dtype: type) -> Tensor:
    """With the rows of gate and up in turn, as the kernel has them."""

    def alternate(rows: Tensor) -> Tensor:
        pairs = rows.reshape(len(rows), layer.pointwise.arity, WIDTH, -1)
        return pairs.transpose(1, 2).reshape(rows.shape)

    function = bodies.fused(among, bias=layer.bias_EG is not None, dtype=TYPES[dtype])
    bias_EG = None if layer.bias_EG is None else alternate(layer.bias_EG)
    feeds = [layer.x_TD, layer.scores_TE, alternate(layer.up_EGD), bias_EG, layer.down_EDI]
    given = {"activation_alpha": 1.0, "activation_beta": 0.0, "normalize_routing_weights": 1}
    gated = int(layer.pointwise.arity == 2)
    return run(
        function, feeds, dtype, k=layer.k, activation_type=name, swiglu_fusion=gated, **given
    )


def gap(made_TD: Tensor, expected_TD: Tensor) -> float:
    """The largest difference over the largest number."""
    assert made_TD.shape == expected_TD.shape
    return ((made_TD - expected_TD).abs().max() / expected_TD.abs().max()).item()


SIZES = [(1, 1), (4, 1), (4, 3), (5, 5)]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("count", "k"), SIZES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("form", ["unrolled", "dense"])
def test_standard_operations(
    form: Form, name: str, count: int, k: int, bias: bool, dtype: type
) -> None:
    layer = layer_of(ACTIVATIONS[name], count, k, bias=bias)
    weights_TE = layer.weights_TE()
    assert (weights_TE != 0).sum() == T * k
    expected = layer.exact(weights_TE)
    assert gap(run_standard(form, layer, weights_TE, dtype), expected) <= CLOSE[dtype]
    if count > k:
        assert gap(expected, layer.exact(weights_TE.roll(1, dims=1))) > CLOSE[dtype]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("count", "k"), SIZES)
@pytest.mark.parametrize("name", [*KERNELS, "identity"])
def test_fused(name: str, count: int, k: int, bias: bool, dtype: type) -> None:
    """Alone in its file, and beside all others, among which an attribute chooses."""
    pointwise = IDENTITY if name == "identity" else ACTIVATIONS[KERNELS[name]]
    layer = layer_of(pointwise, count, k, bias=bias)
    expected = layer.exact(layer.weights_TE())
    for among in ([name], sorted([*KERNELS, "identity"])):
        assert gap(run_fused(layer, name, among, dtype), expected) <= CLOSE[dtype]


STEPS = PLAIN + OPTIONS + [(op, ("z0",), {}) for op in ("acos", "asin")]
STEPS += [("cast", ("z0", "float16"), {}), ("cast", ("z0", "bfloat16"), {})]


def test_every_operation_is_tried() -> None:
    assert {op for op, _, _ in STEPS} == set(OPERATIONS)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_operation_in_a_function(step) -> None:
    """With arguments between -4 and 4; from 0.1 on, or below one, where the operation wants it."""
    op, args, _ = step
    back = [("cast_like", ("t0", "z0"), {})] if op == "cast" else []
    layer = layer_of(Pointwise(1 + ("z1" in args), (step, *back), op), 3, 2, bias=False)
    if op in POSITIVE:
        layer.x_TD.abs_().clamp_(min=0.1)
        layer.up_EGD.abs_().clamp_(min=0.1)
    if op in ("acos", "asin"):
        layer.up_EGD.div_(layer.up_EGD.abs().sum(-1).max() * layer.x_TD.abs().max())
    weights_TE = layer.weights_TE()
    made_TD = run_standard("unrolled", layer, weights_TE, np.float32)
    assert gap(made_TD, layer.exact(weights_TE)) <= CLOSE[np.float32]
