"""FFNs in the branches of If and the bodies of Loop and Scan are found and converted in place."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_files import FLOAT, D, F, Graph, write
from test_onnx_in import TOLERANCE, convert, located

from upcycle.errors import UnsupportedError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ("batch", "sequence", D)


def ffn(graph: Graph, x: str, activation: str = "Relu") -> str:
    return graph.linear(graph.op(activation, graph.linear(x)), F, D)


def info(name: str, kind: int = FLOAT, shape: Any = SHAPE) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def branch(name: str, output: str, graph: Graph, inputs: Any = ()) -> onnx.GraphProto:
    return helper.make_graph(graph.nodes, name, list(inputs), [info(output)], graph.weights)


def positive(graph: Graph, x: str) -> str:
    """Whether the sum of x is above zero."""
    total = graph.op("ReduceSum", x, keepdims=0)
    return graph.op("Greater", total, graph.number(0))


def two_branches(path: Path) -> Path:
    """An FFN in each branch; their weights and tensors have the same names."""
    graph, inner = Graph(), [Graph(seed=1), Graph(seed=2)]
    outs = [ffn(g, "x", act) for g, act in zip(inner, ("Relu", "Tanh"), strict=True)]
    bodies = [branch(n, o, g) for n, o, g in zip(("yes", "no"), outs, inner, strict=True)]
    y = graph.op("If", positive(graph, "x"), then_branch=bodies[0], else_branch=bodies[1])
    return write(path, graph, y)


def shared_weights(path: Path) -> Path:
    """One FFN outside, which is applied in both branches: what a merged decoder looks like."""
    graph, inner = Graph(), [Graph(prefix="first/"), Graph(prefix="next/")]
    weights = [graph.drawn(*shape) for shape in ((D, F), (F,), (F, D))]
    bodies = []
    for name, g in zip(("first", "next"), inner, strict=True):
        x = g.op("Neg", "x") if name == "next" else "x"
        z = g.op("Relu", g.op("Add", g.op("MatMul", x, weights[0]), weights[1]))
        bodies.append(branch(name, g.op("MatMul", z, weights[2]), g))
    y = graph.op("If", positive(graph, "x"), then_branch=bodies[0], else_branch=bodies[1])
    return write(path, graph, graph.op("Add", y, ffn(graph, "x")))


def loop(path: Path) -> Path:
    """Three rounds of ``x + ffn(x)``."""
    graph, body = Graph(), Graph(seed=1)
    out = body.op("Add", "state", ffn(body, "state"))
    going = body.op("Identity", "going")
    inner = helper.make_graph(
        body.nodes,
        "body",
        [info("round", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("state")],
        [info(going, TensorProto.BOOL, []), info(out)],
        body.weights,
    )
    count = graph.add(np.array(3))
    return write(path, graph, graph.op("Loop", count, "", "x", body=inner))


def scan(path: Path) -> Path:
    """An FFN on each row of the sequence, as in a recurrent network."""
    graph, body = Graph(), Graph(seed=1)
    out = ffn(body, "row")
    inner = helper.make_graph(
        body.nodes, "body", [info("row", shape=["batch", D])],
        [info(out, shape=["batch", D])], body.weights,
    )  # fmt: skip
    options = {"scan_input_axes": [1], "scan_output_axes": [1], "num_scan_inputs": 1}
    return write(path, graph, graph.op("Scan", "x", body=inner, **options))


FILES = {
    "if": (two_branches, 2),
    "shared": (shared_weights, 2),
    "loop": (loop, 1),
    "scan": (scan, 1),
}


def outputs(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(path).run(None, {"x": x})[0]


@pytest.mark.parametrize("recipe", ["split-all", "sparse-upcycling"])
@pytest.mark.parametrize("name", FILES)
def test_ffns_inside_are_converted_in_place(name: str, recipe: str, tmp_path: Path) -> None:
    make, count = FILES[name]
    path = make(tmp_path / "dense.onnx")
    assert len(located(path).ffns) == count
    report = convert(path, tmp_path / "out", recipe, "experts.count=4")
    assert len(report.layers) == count
    made = tmp_path / "out" / "model.onnx"
    for sign in (1, -1):  # both branches
        x = sign * np.abs(np.random.default_rng(3).standard_normal((2, 5, D))).astype(np.float32)
        expected = outputs(path, x)
        gap = np.abs(outputs(made, x) - expected).max() / np.abs(expected).max()
        assert gap <= TOLERANCE
    onnx.checker.check_model(made, full_check=True)
    dense = sum(t.ByteSize() for t in onnx.load(path).graph.initializer)
    left = onnx.load(made, load_external_data=False).graph.initializer
    assert sum(len(t.raw_data) for t in left) <= max(dense, 400)  # no dense FFN is left behind


def test_fewer_experts_inside_differ(tmp_path: Path) -> None:
    path = loop(tmp_path / "dense.onnx")
    changes = "router.top_k=1", "layers.every=1", "layers.skip_first=0", "experts.count=4"
    changes += ("verify.max_relative_error=2",)
    report = convert(path, tmp_path / "out", "emoe", *changes)
    assert report.end_to_end.relative > 1e-2


def test_a_body_that_reads_what_nothing_makes_is_refused(tmp_path: Path) -> None:
    model = onnx.load(loop(tmp_path / "dense.onnx"))
    body = model.graph.node[0].attribute[0].g
    body.node[0].input[0] = "nowhere"
    onnx.save(model, tmp_path / "dense.onnx")
    with pytest.raises(UsageError, match="reads 'nowhere' and nothing makes it"):
        convert(tmp_path / "dense.onnx", tmp_path / "out", "split-all")
    assert not (tmp_path / "out").exists()


def test_a_hidden_tensor_that_leaves_its_branch_is_a_miss(tmp_path: Path) -> None:
    graph = Graph()
    bodies = []
    for name in ("yes", "no"):
        g = Graph(seed=1)
        hidden = g.op("Relu", g.linear("x"))
        bodies.append(
            helper.make_graph(
                g.nodes, name, [], [info(hidden, shape=("batch", "sequence", F))], g.weights
            )
        )
    hidden = graph.op("If", positive(graph, "x"), then_branch=bodies[0], else_branch=bodies[1])
    path = write(tmp_path / "dense.onnx", graph, graph.linear(hidden, F, D))
    assert located(path).ffns == ()
    with pytest.raises(UnsupportedError, match="no dense FFN"):
        convert(path, tmp_path / "out", "split-all")
