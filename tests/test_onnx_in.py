"""ONNX in, ONNX out: every spelling of an FFN is found, converted, and computes the same."""

import builtins
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_files
import onnx_ir
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import helper

from upcycle.cli.main import main
from upcycle.cli.preview import inspect_model, plan_model
from upcycle.conversion.options import Options
from upcycle.conversion.pipeline import convert_model
from upcycle.conversion.verify_directory import verify_directory
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.ffn import Located
from upcycle.ir.report import Report
from upcycle.models.named import open_model
from upcycle.recipe.reader import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {
    "split-all": ("experts.count=4",),
    "sparse-upcycling": ("experts.count=3",),
    "granular": ("experts.count=2", "experts.granularity=4"),
}
# Both files compute in float32: sums of at most 64 products in two or four layers on one path, each
# off by n / 2 eps of its magnitudes at most, which are some 10 times the sum (the terms cancel):
# 2 * 64 * 10 / 2 eps = 7.6e-5 in the worst case, and a tenth of that for errors of random sign.
TOLERANCE = 1e-5
HALF = 5e-3  # the same in float16, where each stored number is off by 2.4e-4


def convert(path: Path, out: Path, recipe: str, *changes: str, **options: Any) -> Report:
    loaded = load_recipe(recipe, list(changes))
    targets = options.pop("targets", ("safetensors", "onnx"))
    return convert_model(
        open_model(str(path)),
        loaded,
        recipe_name=recipe,
        out=out,
        options=Options(targets=targets, **options),
    )


def located(path: Path) -> Located:
    return inspect_model(open_model(str(path)))


def feeds(session: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of sizes that the conversion did not see."""
    generator = np.random.default_rng(7)
    made: dict[str, np.ndarray[Any, Any]] = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else (3, 6)[i] for i, size in enumerate(value.shape)]
        if "int64" in value.type:
            high = 2 if "mask" in value.name else 50
            made[value.name] = np.asarray(generator.integers(1, high, shape))
        else:
            dtype = np.float16 if "float16" in value.type else np.float32
            made[value.name] = generator.standard_normal(shape).astype(dtype)
    return made


def relative(dense: Path, converted: Path) -> float:
    """The largest difference of an output over its largest value, both files in ONNX Runtime."""
    sessions = [onnxruntime.InferenceSession(path) for path in (dense, converted)]
    given = feeds(sessions[0])
    worst = 0.0
    for reference, ours in zip(*(s.run(None, given) for s in sessions), strict=True):
        assert reference.shape == ours.shape
        assert reference.dtype == ours.dtype
        gap = np.abs(ours.astype(np.float64) - reference).max()
        worst = max(worst, float(gap / np.abs(reference.astype(np.float64)).max()))
    return worst


@pytest.mark.parametrize("form", onnx_files.FORMS)
def test_every_spelling_is_found_and_converted_exactly(form: str, tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", form)
    found = located(path)
    assert [ffn.pointwise.name for ffn in found.ffns] == [onnx_files.FORMS[form][1]] * 2
    assert {(ffn.d_model, ffn.d_ff, ffn.d_out) for ffn in found.ffns} == {(16, 32, 16)}
    for recipe, changes in EXACT.items():
        report = convert(path, tmp_path / recipe, recipe, *changes)
        assert all(check.passed for check in report.checks)
        assert relative(path, tmp_path / recipe / "model.onnx") <= TOLERANCE


@pytest.mark.parametrize("dynamo", [True, False], ids=["new-exporter", "old-exporter"])
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "mlp"])
def test_exported_models_are_converted_exactly(name: str, dynamo: bool, tmp_path: Path) -> None:
    path = onnx_files.export(tmp_path / "dense.onnx", name, dynamo=dynamo)
    assert len(located(path).ffns) == 2
    for recipe, changes in EXACT.items():
        convert(path, tmp_path / recipe, recipe, *changes)
        assert relative(path, tmp_path / recipe / "model.onnx") <= TOLERANCE


@pytest.mark.parametrize("form", ["gemm-erf", "swiglu-split"])
def test_fewer_experts_differ_and_are_reported(form: str, tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", form)
    changes = "router.top_k=1", "layers.every=1", "layers.skip_first=0"
    report = convert(path, tmp_path / "out", "emoe", "experts.count=4", *changes)
    error = relative(path, tmp_path / "out" / "model.onnx")
    assert error > 1e-2
    assert report.end_to_end.relative > 1e-2
    assert all(row.all_experts_relative is not None for row in report.layers)
    again = verify_directory(open_model(str(path)), tmp_path / "out")
    assert again.end_to_end == report.end_to_end


@pytest.mark.parametrize("form", ["relu", "swiglu-split", "convolution", "gemm-erf"])
@pytest.mark.parametrize("opset", [11, 14, 18, 21, 23])
def test_old_and_new_opsets(opset: int, form: str, tmp_path: Path) -> None:
    if opset < 13 and form == "swiglu-split":
        pytest.skip("its Split needs opset 13")
    path = onnx_files.by_hand(tmp_path / "dense.onnx", form, opset=opset)
    convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert relative(path, tmp_path / "out" / "model.onnx") <= TOLERANCE
    versions = {o.domain: o.version for o in onnx.load(tmp_path / "out/model.onnx").opset_import}
    assert versions[""] == max(21, opset)


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "swiglu", dtype=np.float16)
    for recipe, changes in EXACT.items():
        convert(path, tmp_path / recipe, recipe, *changes)
        assert relative(path, tmp_path / recipe / "model.onnx") <= HALF


def test_external_data_is_read_and_the_rest_kept_beside(tmp_path: Path) -> None:
    graph = onnx_files.Graph()
    x = graph.op("MatMul", "x", graph.drawn(16, 16))  # not part of an FFN
    y = graph.op("Add", x, onnx_files.FORMS["erf"][0](graph, x))
    path = onnx_files.write(tmp_path / "dense.onnx", graph, y, external=True)
    out = tmp_path / "out"
    convert(path, out, "split-all", "experts.count=4")
    assert relative(path, out / "model.onnx") <= TOLERANCE
    (tmp_path / "weights.bin").unlink()  # the result stands alone
    onnxruntime.InferenceSession(out / "model.onnx")
    assert (out / "model.onnx.data").stat().st_size == 16 * 16 * 4


def test_one_ffn_at_two_places_is_converted_once(tmp_path: Path) -> None:
    graph = onnx_files.Graph()
    up, bias, down = graph.drawn(16, 32), graph.drawn(32), graph.drawn(32, 16)
    x = "x"
    for _ in range(3):
        z = graph.op("Add", graph.op("MatMul", x, up), bias)
        x = graph.op("MatMul", graph.op("Relu", z), down)  # the input of the next is an output
    path = onnx_files.write(tmp_path / "dense.onnx", graph, x)
    assert len(located(path).ffns) == 1
    convert(path, tmp_path / "out", "granular", *EXACT["granular"], "onnx.form=fused")
    assert relative(path, tmp_path / "out/model.onnx") <= TOLERANCE
    model = onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    assert sum(node.op_type == "MoE" for node in model.graph.node) == 3


def test_equal_biases_that_are_stored_once_keep_the_ffns_apart(tmp_path: Path) -> None:
    graph = onnx_files.Graph()
    up_bias, down_bias = graph.drawn(32), graph.drawn(16)
    x = "x"
    for _ in range(2):
        z = graph.op("Add", graph.op("MatMul", x, graph.drawn(16, 32)), up_bias)
        y = graph.op("MatMul", graph.op("Relu", z), graph.drawn(32, 16))
        x = graph.op("Add", x, graph.op("Add", down_bias, y))
    path = onnx_files.write(tmp_path / "dense.onnx", graph, x)
    assert len(located(path).ffns) == 2
    convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert relative(path, tmp_path / "out/model.onnx") <= TOLERANCE


def test_the_directory_is_complete_and_loads_anywhere(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    out = tmp_path / "out"
    report = convert(path, out, "sparse-upcycling")
    names = {file.name for file in out.iterdir()}
    assert names == {
        "model.onnx", "experts.safetensors", "recipe.yaml", "report.html", "report.json",
        "README.md", "provenance.json",
    }  # fmt: skip
    assert json.loads((out / "report.json").read_text())["checks"] == report.to_json()["checks"]
    assert "library_name: onnx" in (out / "README.md").read_text()
    assert str(tmp_path) not in "".join(f.read_text("latin-1") for f in out.iterdir())
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    dense = sum(t.ByteSize() for t in onnx.load(path).graph.initializer)
    left = onnx.load(out / "model.onnx", load_external_data=False).graph.initializer
    assert sum(len(t.raw_data) for t in left) < dense / 10  # the dense FFNs are gone


def test_the_page_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "onnx-in.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.S | re.M)
    (commands,) = re.findall(r"^```sh\n(.*?)^```", page, flags=re.S | re.M)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "docs/onnx-in.md", "exec"), {})
    for line in (*commands.splitlines(), "upcycle verify mlp.onnx mlp-moe"):
        result = CliRunner().invoke(main, shlex.split(line)[1:], standalone_mode=False)
        assert result.exception is None, line
    files = {file.name for file in (tmp_path / "mlp-moe").iterdir()}
    assert {"model.onnx", "experts.safetensors"} < files


def test_plan_reads_sizes(tmp_path: Path) -> None:
    source = open_model(str(onnx_files.by_hand(tmp_path / "dense.onnx", "relu")))
    plan, costs, _ = plan_model(source, load_recipe("sparse-upcycling"), "sparse-upcycling")
    assert len(plan.specs) == 2
    assert costs.parameters_before == 2 * (16 * 32 + 32 + 32 * 16 + 16)


def quantised(path: Path, *, dynamic: bool = False, dequantise: bool = True) -> Path:
    """An FFN with int8 weights, in one of three spellings."""
    graph = onnx_files.Graph()

    def weight(rows: int, columns: int) -> np.ndarray[Any, Any]:
        drawn = np.random.default_rng(rows).integers(-99, 99, (rows, columns))
        return np.asarray(drawn.astype(np.int8))

    def linear(x: str, rows: int, columns: int) -> str:
        stored, scale = graph.add(weight(rows, columns)), graph.number(0.01)
        if dynamic:
            data = graph.many("DynamicQuantizeLinear", x, outputs=3)
            product = graph.op("Cast", graph.op("MatMulInteger", data[0], stored, data[2]), to=1)
            return graph.op("Mul", product, graph.op("Mul", data[1], scale))
        if dequantise:
            return graph.op("MatMul", x, graph.op("DequantizeLinear", stored, scale))
        cast = graph.op("Cast", stored, to=1)
        return graph.op("MatMul", x, graph.op("Mul", cast, scale))

    y = linear(graph.op("Relu", linear("x", 16, 32)), 32, 16)
    return onnx_files.write(path, graph, y)


@pytest.mark.parametrize(
    "options", [{}, {"dequantise": False}, {"dynamic": True}], ids=["qdq", "cast", "dynamic"]
)
def test_quantised_ffns_are_misses_with_the_reason(options: Any, tmp_path: Path) -> None:
    path = quantised(tmp_path / "dense.onnx", **options)
    (miss,) = located(path).misses
    assert "quantised (int8)" in miss.reason
    with pytest.raises(UnsupportedError, match="no dense FFN to convert"):
        convert(path, tmp_path / "out", "split-all")
    assert not (tmp_path / "out").exists()


def test_an_unknown_operation_is_no_obstacle_beside_the_ffn(tmp_path: Path) -> None:
    graph = onnx_files.Graph()
    x = graph.op("Mystery", "x", domain=onnx_files.OTHER)
    y = onnx_files.FORMS["relu"][0](graph, x)
    path = onnx_files.write(tmp_path / "dense.onnx", graph, y)
    assert len(located(path).ffns) == 1
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime cannot run dense.onnx: .*Mystery"):
        convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert not (tmp_path / "out").exists()


def test_a_hidden_tensor_that_is_read_elsewhere_is_a_miss(tmp_path: Path) -> None:
    graph = onnx_files.Graph()
    hidden = graph.op("Relu", graph.linear("x"))
    y = graph.op("Add", graph.linear(hidden, 32, 16), graph.op("ReduceMean", hidden, axes=[-1]))
    path = onnx_files.write(tmp_path / "dense.onnx", graph, y)
    (miss,) = located(path).misses
    assert "its hidden tensor is also read by `mean`" in miss.reason


def broken(tmp_path: Path, problem: str) -> Path:
    path = tmp_path / "dense.onnx"
    external = problem in ("missing data", "short data", "data elsewhere", "bad offset")
    onnx_files.by_hand(path, "relu", external=external, opset=17)
    if problem == "text":
        path.write_text("this is no protobuf, not even a little")
    elif problem == "empty":
        path.write_bytes(b"")
    elif problem == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif problem == "missing data":
        (tmp_path / "weights.bin").unlink()
    elif problem == "short data":
        (tmp_path / "weights.bin").write_bytes(b"0" * 100)
    else:
        model = onnx.load(path, load_external_data=False)
        nodes = model.graph.node
        if problem == "cycle":
            nodes[0].input[0] = nodes[-1].output[0]
        elif problem == "lost tensor":
            nodes[-1].input[0] = "nowhere"
        elif problem == "made twice":
            nodes[-1].output[0] = nodes[0].output[0]
        elif problem == "old opset":
            model.opset_import[0].version = 7
        elif problem == "future opset":
            model.opset_import[0].version = 999
        elif problem == "no operation":
            nodes[0].op_type = "NoSuchOp"
        elif problem == "unknown domain":
            nodes[0].domain = "not.declared"
        elif problem == "endless function":
            call = helper.make_node("F", ["x"], ["y"], domain="f")
            opsets = [helper.make_opsetid("f", 1)]
            model.functions.append(helper.make_function("f", "F", ["x"], ["y"], [call], opsets))
            model.opset_import.extend(opsets)
            nodes.insert(0, helper.make_node("F", ["x"], ["again"], domain="f"))
        elif problem == "bad offset":
            tensor = next(t for t in model.graph.initializer if t.external_data)
            next(e for e in tensor.external_data if e.key == "offset").value = "here"
        elif problem == "data elsewhere":
            tensor = next(t for t in model.graph.initializer if t.external_data)
            tensor.external_data[0].value = "../weights.bin"
        path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("problem", "words", "code"),
    [
        ("text", "not an ONNX file", 2),
        ("empty", "not an ONNX file, or an empty one", 2),
        ("truncated", "not an ONNX file, or a truncated one", 2),
        ("missing data", "its external data weights.bin is missing", 2),
        ("short data", "its external data weights.bin is too short", 2),
        ("data elsewhere", "outside the folder of the file", 2),
        ("cycle", "reads 'Add_.*' before it is made, or in a cycle", 2),
        ("lost tensor", "reads 'nowhere' and nothing makes it", 2),
        ("made twice", "is made twice", 2),
        ("old opset", "its opset is 7, and 11 is the oldest", 4),
        ("future opset", "its opset is 999, and onnx here knows", 4),
        ("no operation", "the node 'MatMul_0' is no ONNX operation: 'NoSuchOp'", 4),
        ("unknown domain", "the domain 'not.declared' of the node 'MatMul_0' has no version", 4),
        ("endless function", "its functions are not valid: Cyclic", 2),
        ("bad offset", "the graph is not valid: .*'here'", 2),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    problem: str, words: str, code: int, tmp_path: Path
) -> None:
    path = broken(tmp_path, problem)
    with pytest.raises((UsageError, UnsupportedError), match=words) as caught:
        convert(path, tmp_path / "out", "split-all")
    assert caught.value.exit_code == code
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    with pytest.raises(UsageError, match="`dtype`: it does not apply to an ONNX file"):
        open_model(str(path), dtype="float32")
    with pytest.raises(UsageError, match="no such file"):
        open_model(str(tmp_path / "nothing.onnx"))
    with pytest.raises(UsageError, match="an ONNX file becomes an ONNX file"):
        convert(path, tmp_path / "out", "split-all", targets=("safetensors",))
    with pytest.raises(UsageError, match="`stream`: it does not apply"):
        convert(path, tmp_path / "out", "split-all", stream=True)


def test_without_onnxruntime_only_the_verification_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="needs ONNX Runtime: pip install"):
        convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert not (tmp_path / "out").exists()
    convert(path, tmp_path / "out", "split-all", "experts.count=4", verify=False)
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_a_wrong_expert_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcycle.conversion import onnx_rewrite
    from upcycle.errors import VerificationError

    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    right = onnx_rewrite.stored_value

    def swapped(name: str, stored: Any, directory: Path) -> Any:
        value = right(name, stored, directory)
        if name.endswith(".experts.up_proj"):
            value.const_value = onnx_ir.tensor(value.const_value.numpy()[::-1].copy())
        return value

    monkeypatch.setattr(onnx_rewrite, "stored_value", swapped)
    with pytest.raises(VerificationError, match="verification failed"):
        convert(path, tmp_path / "out", "split-all", "experts.count=4")
    assert not (tmp_path / "out").exists()


def test_subgraphs_that_read_a_hidden_tensor_are_readers(tmp_path: Path) -> None:
    graph = onnx_files.Graph()
    hidden = graph.op("Relu", graph.linear("x"))
    y = graph.linear(hidden, 32, 16)
    inner = [helper.make_node("ReduceSum", [hidden], ["inner"], keepdims=0)]
    info = helper.make_tensor_value_info("inner", onnx_files.FLOAT, [])
    branch = helper.make_graph(inner, "branch", [], [info])
    yes = graph.add(np.array(True))
    total = graph.op("If", yes, then_branch=branch, else_branch=branch)
    path = onnx_files.write(tmp_path / "dense.onnx", graph, graph.op("Add", y, total))
    (miss,) = located(path).misses
    assert "its hidden tensor is also read by `sum`" in miss.reason
