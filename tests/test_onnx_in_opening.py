"""Files that are opened with care: links of a cache, old forms, damaged and very large graphs."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_files
import pytest
from onnx import helper, numpy_helper
from onnx_files import D, F, Graph
from test_onnx_in import TOLERANCE, convert, located, relative

from upcycle.errors import UnsupportedError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(path: Path, **options: Any) -> Path:
    return onnx_files.by_hand(path, "relu", **options)


def changed(path: Path, change: Any) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def in_a_cache(folder: Path) -> Path:
    """The file and its data as links into ``blobs``, as the cache of the hub has them."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "1" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    real = plain(blobs / "dense.onnx", external=True)
    real.rename(blobs / "aaa")
    (blobs / "weights.bin").rename(blobs / "bbb")
    (snapshot / "dense.onnx").symlink_to("../../../blobs/aaa")
    (snapshot / "weights.bin").symlink_to("../../../blobs/bbb")
    return snapshot / "dense.onnx"


@pytest.mark.parametrize("recipe", ["split-all", "moefication"])
def test_links_of_a_cache_are_followed(recipe: str, tmp_path: Path) -> None:
    """The second recipe runs the file up to its FFNs, from a copy in memory."""
    path = in_a_cache(tmp_path)
    changes = ("router.top_k=2",) if recipe == "moefication" else ()
    convert(path, tmp_path / "out", recipe, "experts.count=4", *changes)
    if recipe == "split-all":
        assert relative(path, tmp_path / "out" / "model.onnx") <= TOLERANCE


def test_other_links_are_refused(tmp_path: Path) -> None:
    path = in_a_cache(tmp_path)
    (tmp_path / "blobs" / "bbb").rename(tmp_path / "elsewhere")
    data = path.parent / "weights.bin"
    data.unlink()
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"weights\.bin, outside the folder of the file"):
        located(path)
    data.unlink()
    data.symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"its external data weights\.bin is missing"):
        located(path)


def test_a_hard_link_is_a_file_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = plain(tmp_path / "a" / "dense.onnx", external=True)
    (tmp_path / "again").hardlink_to(tmp_path / "a" / "weights.bin")
    convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert relative(path, tmp_path / "out" / "model.onnx") <= TOLERANCE


def test_initializers_that_are_inputs_raise_the_ir_version(tmp_path: Path) -> None:
    def old(model: onnx.ModelProto) -> None:
        model.ir_version = 3
        for weight in model.graph.initializer:
            value = helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            model.graph.input.append(value)

    path = changed(plain(tmp_path / "dense.onnx", opset=11), old)
    onnx.checker.check_model(path)
    convert(path, tmp_path / "out", "split-all", "experts.count=4")
    made = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert made.ir_version >= 10
    assert [value.name for value in made.graph.input] == ["x"]


def sparse(name: str) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.ones(2, np.float32), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 3])), [D])


def sparse_initializer(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(sparse("thin"))


def sparse_constant(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["thin"], sparse_value=sparse("values"))
    model.graph.node.insert(0, node)


def zip_map(model: onnx.ModelProto) -> None:
    kind = helper.make_map_type_proto(onnx.TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    value = helper.make_value_info("chances", helper.make_sequence_type_proto(kind))
    made, options = model.graph.output[0].name, {"classlabels_int64s": list(range(D))}
    node = helper.make_node("ZipMap", [made], ["chances"], domain="ai.onnx.ml", **options)
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    model.graph.output[0].CopyFrom(value)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sparse_initializer, "its tensor 'thin' is stored sparse, which cannot be read"),
        (sparse_constant, "its tensor 'thin' is stored sparse, which cannot be read"),
        (zip_map, "chances is a map, or a sequence of maps, .* zipmap=False"),
    ],
)
def test_valid_files_that_cannot_be_read(
    change: Any, words: str, opset: int, tmp_path: Path
) -> None:
    path = changed(plain(tmp_path / "dense.onnx", opset=opset), change)
    with pytest.raises(UnsupportedError, match=words):
        located(path)


def test_an_output_that_is_a_sequence_is_compared_part_by_part(tmp_path: Path) -> None:
    def sequence(model: onnx.ModelProto) -> None:
        made = model.graph.output[0].name
        model.graph.node.append(helper.make_node("SequenceConstruct", [made, made], ["both"]))
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None))
        model.graph.output[0].CopyFrom(helper.make_value_info("both", kind))

    path = changed(plain(tmp_path / "dense.onnx"), sequence)
    report = convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert report.end_to_end is not None
    assert set(report.end_to_end.outputs) == {"both.0", "both.1"}


def test_drawn_inputs_that_do_not_fit(tmp_path: Path) -> None:
    graph = Graph()
    placed = graph.op("Add", "x", graph.drawn(8, D))  # a table of 8 positions
    y = graph.linear(graph.op("Relu", graph.linear(placed)), F, D)
    path = onnx_files.write(tmp_path / "dense.onnx", graph, y)
    words = r"it was given random inputs: x \[2, 11, 16\].*: if they do not fit, give others with"
    with pytest.raises(UnsupportedError, match=words):
        convert(path, tmp_path / "out", "split-all", "experts.count=4")


def no_text(model: onnx.ModelProto) -> bytes:
    data = model.SerializeToString()
    return data.replace(b"MatMul", b"MatM\xf5l", 1)


def unknown_type(model: onnx.ModelProto) -> bytes:
    model.graph.initializer[1].data_type = 27
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("damage", [no_text, unknown_type])
def test_damaged_graphs_are_refused_in_one_sentence(damage: Any, tmp_path: Path) -> None:
    path = plain(tmp_path / "dense.onnx", opset=21)
    path.write_bytes(damage(onnx.load(path)))
    with pytest.raises(UsageError, match="the graph is not valid") as caught:
        located(path)
    assert len(str(caught.value).splitlines()) == 1


def chain(kind: str, length: int) -> Graph:
    """An FFN behind, or with, `length` operations in a row."""
    graph = Graph()
    x, hidden = "x", ""
    weight = graph.drawn(D, F)
    for _ in range(length):
        if kind == "copies of the input":
            x = graph.op("Identity", x)
        elif kind == "doublings of the input":
            x = graph.op("Add", x, x)
        elif kind == "doublings of the weight":
            weight = graph.op("Add", weight, weight)
    hidden = graph.op("Relu", graph.op("MatMul", x, weight))
    for _ in range(length if kind == "activations" else 0):
        hidden = graph.op("Relu", hidden)
    graph.op("MatMul", hidden, graph.drawn(F, D))
    return graph


@pytest.mark.parametrize(
    ("kind", "length", "reason"),
    [
        ("copies of the input", 5000, None),
        ("doublings of the input", 1000, None),
        ("doublings of the weight", 1000, "is computed in the graph"),
        ("activations", 5000, "too many in a row to follow"),
    ],
)
def test_long_graphs_are_inspected_in_linear_time(
    kind: str, length: int, reason: str | None, tmp_path: Path
) -> None:
    graph = chain(kind, length)
    path = onnx_files.write(tmp_path / "x.onnx", graph, graph.nodes[-1].output[0], opset=21)
    start = time.process_time()
    found = located(path)
    assert time.process_time() - start < 20  # some 2 s; walks back to the inputs took minutes
    assert len(found.ffns) == (reason is None)
    assert [reason in miss.reason for miss in found.misses if reason] == [True] * (
        reason is not None
    )


def test_branches_in_branches_are_read_once(tmp_path: Path) -> None:
    count = 0

    def nested(depth: int, x: str) -> onnx.GraphProto:
        nonlocal count
        count += 1
        name = f"g{count}"
        if not depth:
            node = helper.make_node("Relu", [x], [name])
        else:
            branches = {b: nested(depth - 1, x) for b in ("then_branch", "else_branch")}
            node = helper.make_node("If", ["choice"], [name], **branches)
        out = helper.make_tensor_value_info(name, 1, None)
        return helper.make_graph([node], name, [], [out])

    graph = Graph()
    y = graph.linear(graph.op("Relu", graph.linear("x")), F, D)
    inner = nested(9, y)
    graph.nodes += inner.node
    path = onnx_files.write(tmp_path / "x.onnx", graph, inner.node[0].output[0], opset=21)
    choice = helper.make_tensor_value_info("choice", onnx.TensorProto.BOOL, [])
    changed(path, lambda model: model.graph.input.append(choice))
    start = time.process_time()
    assert len(located(path).ffns) == 1
    assert time.process_time() - start < 20  # under 1 s
