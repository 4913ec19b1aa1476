"""Products in an ONNX file that are fused, scaled or turned: found, or a miss with the reason."""

from pathlib import Path
from typing import Any

import onnx
import onnx_files
import pytest
from onnx import helper
from onnx_files import MS, D, F, Graph
from test_onnx_in import TOLERANCE, convert, located, relative

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ("batch", D)
PLANES = ("batch", D, 4, 4)


def residual(g: Graph, c: str, **options: float) -> str:
    hidden = g.op("Relu", g.op("Gemm", "x", g.drawn(D, F), g.drawn(F)))
    return g.op("Gemm", hidden, g.drawn(F, D), c, **options)


def scaled(g: Graph) -> str:
    hidden = g.op("Relu", g.op("Gemm", "x", g.drawn(D, F), alpha=0.5))
    return g.op("FusedMatMul", hidden, g.drawn(F, D), domain=MS, alpha=2.0)


def fused_gemm(g: Graph, activation: str = "Relu", **slopes: float) -> str:
    options: Any = {"domain": MS, "activation": activation, **slopes}
    hidden = g.op("FusedGemm", "x", g.drawn(D, F), g.drawn(F), **options)
    return g.op("Gemm", hidden, g.drawn(F, D), g.drawn(D))


def fused_chain(g: Graph) -> str:
    """Of the second node the product ends an FFN, and the activation is outside of it."""
    x, sizes = "x", [(D, F), (F, D), (D, F)]
    for size in sizes:
        more: Any = {"domain": MS, "activation": "Relu"}
        x = g.op("FusedGemm", x, g.drawn(*size), g.drawn(size[1]), **more)
    return g.op("Gemm", x, g.drawn(F, D), g.drawn(D))


def fused_conv(g: Graph) -> str:
    more: Any = {"domain": MS, "activation": "Relu"}
    hidden = g.op("FusedConv", "x", g.drawn(F, D, 1, 1), g.drawn(F), **more)
    return g.op("FusedConv", hidden, g.drawn(D, F, 1, 1), g.drawn(D), "x", **more)


def in_front(g: Graph) -> str:
    hidden = g.op("Relu", g.op("MatMul", "x", g.drawn(1, D, F)))
    return g.op("MatMul", hidden, g.drawn(1, F, D))


FOUND: dict[str, tuple[Any, Any, int]] = {
    "residual": (lambda g: residual(g, "x"), ROWS, 1),
    "half of a residual": (lambda g: residual(g, "x", beta=0.5), ROWS, 1),
    "one number": (lambda g: residual(g, g.number(0.3)), ROWS, 1),
    "a matrix": (lambda g: residual(g, g.drawn(3, D)), (3, D), 1),
    "scaled with a bias": (lambda g: residual(g, g.drawn(D), alpha=0.5, beta=2.0), ROWS, 1),
    "scaled": (scaled, ROWS, 1),
    "FusedGemm": (fused_gemm, ROWS, 1),
    "LeakyRelu": (lambda g: fused_gemm(g, "LeakyRelu", activation_alpha=0.2), ROWS, 1),
    "FusedGemm, in a chain": (fused_chain, ROWS, 2),
    "FusedConv": (fused_conv, PLANES, 1),
    "axes in front": (in_front, ("batch", "sequence", D), 1),
}


def written(path: Path, make: Any, shape: Any) -> Path:
    graph = Graph()
    return onnx_files.write(path, graph, make(graph), shape=shape)


@pytest.mark.parametrize("case", FOUND)
def test_fused_and_scaled_products_are_converted_exactly(case: str, tmp_path: Path) -> None:
    make, shape, count = FOUND[case]
    path = written(tmp_path / "dense.onnx", make, shape)
    assert len(located(path).ffns) == count
    convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert relative(path, tmp_path / "out" / "model.onnx") <= TOLERANCE


def test_what_no_ffn_ends_inside_of_stays_fused(tmp_path: Path) -> None:
    """The last node adds a residual and is behind a norm: no FFN ends there."""

    def make(g: Graph) -> str:
        y = residual(g, "x")
        norm = g.op("LayerNormalization", y, g.drawn(D), axis=-1)
        return g.op("Gemm", norm, g.drawn(D, D), "x", alpha=0.5)

    path = written(tmp_path / "dense.onnx", make, ROWS)
    convert(path, tmp_path / "out", "split-all", "experts.count=4")
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    (kept,) = [n for n in nodes if n.op_type == "Gemm" and "x" in n.input and len(n.input) == 3]
    assert {a.name: a.f for a in kept.attribute}["alpha"] == 0.5
    assert relative(path, tmp_path / "out" / "model.onnx") <= TOLERANCE


def turned(g: Graph) -> str:
    return g.op("MatMul", g.drawn(D, F), g.op("Relu", g.op("MatMul", g.drawn(F, D), "x")))


def trans_a(g: Graph) -> str:
    hidden = g.op("Relu", g.op("Gemm", "x", g.drawn(D, F), transA=1))
    return g.op("Gemm", hidden, g.drawn(F, D))


def scaled_before_its_bias(g: Graph) -> str:
    hidden = g.op("Relu", g.op("Gemm", "x", g.drawn(D, F), g.drawn(F), alpha=0.5))
    return g.op("Gemm", hidden, g.drawn(F, D))


def unknown_activation(g: Graph) -> str:
    return fused_gemm(g, "NoSuchActivation")


def weight_is_an_output(g: Graph) -> str:
    w = g.drawn(D, F)
    y = g.op("MatMul", g.op("Relu", g.op("MatMul", "x", w)), g.drawn(F, D))
    return g.op("Add", y, g.op("ReduceSum", w, keepdims=0))


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (turned, (D, "n"), "its MatMul node MatMul_2 maps the first of two axes"),
        (trans_a, (D, D), "its Gemm node Gemm_0 maps the first of two axes"),
        (in_front, ROWS, "its product MatMul_0 has axes that its input lacks"),
        (scaled_before_its_bias, ROWS, "its nonlinearity has a parameter of its own"),
        (weight_is_an_output, ROWS, "is also read by `sum` in"),
    ],
)
def test_other_products_are_misses_that_name_a_node(
    make: Any, shape: Any, reason: str, tmp_path: Path
) -> None:
    graph = Graph()
    out = [1, *shape] if make is in_front else shape
    path = onnx_files.write(tmp_path / "dense.onnx", graph, make(graph), shape=shape)
    model = onnx.load(path)
    kind = model.graph.output[0].type.tensor_type.elem_type
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(model.graph.output[0].name, kind, out)
    )
    onnx.save(model, path)
    found = located(path)
    assert not found.ffns
    (miss,) = found.misses
    assert reason in miss.reason
    assert miss.path


def test_a_weight_that_is_an_output_is_said_to_be_one(tmp_path: Path) -> None:
    graph = Graph()
    w = graph.drawn(D, F)
    y = graph.op("MatMul", graph.op("Relu", graph.op("MatMul", "x", w)), graph.drawn(F, D))
    path = onnx_files.write(tmp_path / "dense.onnx", graph, y)
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info(w, 1, [D, F]))
    onnx.save(model, path)
    (miss,) = located(path).misses
    assert f"its weight `{w}` is also an output of the model: untie them first" in miss.reason
    assert miss.path


def test_an_unknown_fused_activation_is_no_ffn_and_no_error(tmp_path: Path) -> None:
    path = written(tmp_path / "dense.onnx", unknown_activation, ROWS)
    assert not located(path).ffns
