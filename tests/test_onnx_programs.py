"""Every pointwise operation as ONNX nodes."""

from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from upcycle.errors import UnsupportedError
from upcycle.onnx.nodes import OPSET, Nodes
from upcycle.pointwise import OPS, Pointwise
from upcycle.targets.onnx.forms.activation import OPERATIONS, build

EPS = torch.finfo(torch.float32).eps
POSITIVE = {"log", "log10", "log1p", "log2", "pow", "rsqrt", "sqrt", "reciprocal", "div"}
TWO = {"add", "cast_like", "div", "maximum", "minimum", "mul", "rsub", "sub"}
TWO |= {"ge", "gt", "le", "logical_and", "logical_or", "lt"}

# Constants and options as models write them, beside the plain form of every operation.
OPTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("add", ("z0", 0.5), {"alpha": 2}),
    ("cast", ("z0", "float32"), {}),
    ("celu", ("z0",), {"alpha": 0.5}),
    ("clamp", ("z0", -0.5), {}),
    ("clamp", ("z0",), {"max": 1.5}),
    ("clamp", ("z0", -0.5, 1.5), {}),
    ("elu", ("z0", 0.5), {}),
    ("gelu", ("z0",), {"approximate": "tanh"}),
    ("hardtanh", ("z0", -0.5, 1.5), {}),
    ("leaky_relu", ("z0",), {"negative_slope": 0.2, "inplace": True}),
    ("mul", ("z0", 3), {}),
    ("pow", ("z0", 2), {}),
    ("pow", (2, "z0"), {}),
    ("rsub", ("z0", 1), {"alpha": 2}),
    ("softplus", ("z0",), {"beta": 2, "threshold": 3}),
    ("sub", (1.5, "z0"), {}),
    ("where", ("z0", "z1", 0.0), {}),
    ("hardshrink", ("z0", 0.75), {}),
    ("softshrink", ("z0",), {"lambd": 0.75}),
    ("threshold", ("z0", 0.5, -1.0), {}),
]
PLAIN = [
    (op, ("z0", "z1") if op in TWO else ("z0", "z1") if op == "pow" else ("z0",), {})
    for op in sorted(OPS)
    if op not in ("cast", "acos", "asin", "clamp", "threshold", "where")
]


def run(program: Pointwise, *z: torch.Tensor) -> torch.Tensor:
    inputs = [ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT)) for i in range(len(z))]
    for value in inputs:
        value.shape = ir.Shape(["n"])
    n = Nodes()
    out = n("Identity", build(program, n, inputs), name="y")
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n"])
    graph = ir.Graph(inputs, [out], nodes=n.nodes, opset_imports={"": OPSET}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    runner = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {f"x{i}": tensor.numpy() for i, tensor in enumerate(z)}
    return torch.from_numpy(runner.run(None, feeds)[0])


@pytest.mark.parametrize("step", PLAIN + OPTIONS, ids=str)
def test_operation(step) -> None:
    op, args, _ = step
    x = torch.linspace(0.1, 8, 101) if op in POSITIVE else torch.linspace(-8, 8, 101)
    z = [x, x.flip(0) / 3][: 2 if "z1" in args else 1]
    expected = Pointwise(len(z), (step,))(*(t.double() for t in z))
    # A few roundings of the result, and of the argument, which exp and pow make larger.
    bound = 32 * EPS * expected.abs().clamp(min=1)
    error = (run(Pointwise(len(z), (step,)), *z).double() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()


def test_every_operation_has_a_form() -> None:
    assert set(OPERATIONS) == set(OPS)


def test_steps_read_earlier_steps() -> None:
    x = torch.linspace(-3, 3, 13)
    steps = (("sigmoid", ("z0",), {}), ("mul", ("t0", "z0"), {}), ("add", ("t1", "t0"), {}))
    program = Pointwise(1, steps)
    torch.testing.assert_close(run(program, x), program(x), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (("lgamma", ("z0",), {}), "'lgamma', which has no ONNX form"),
        (("div", ("z0", 2), {"rounding_mode": "floor"}), "rounding_mode='floor'"),
        (("cast", ("z0", "float8_e4m3fn"), {}), "cast to float8_e4m3fn"),
    ],
    ids=str,
)
def test_what_has_no_form_is_named(step, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        run(Pointwise(1, (step,)), torch.ones(3))
