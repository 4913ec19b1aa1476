"""``upcycle graph``, and the picture of the converted layers in report.html."""

import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import onnx_files
import page_case
import pytest
import small_models
from command_line import run

from upcycle.errors import UsageError
from upcycle.page.page import Contents, page, read_contents
from upcycle.page.sites import sites_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are the same wherever the tests run."""
    kept = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "dot").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(kept))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "llama-moe"
    run("convert", llama, "--recipe", "sparse-upcycling", "--out", out, "-q")
    return out


@pytest.fixture(scope="module")
def bert_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    dense, out = small_models.saved("bert", folder / "bert"), folder / "bert-moe"
    recipe = ("--recipe", "moefication", "--target", "safetensors")
    run("convert", dense, *recipe, "--out", out, "-q")
    return out


def data_of(*arguments: object) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(run("graph", *arguments, "--json").stdout)
    return read


def facts_of(data: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node for node in data["nodes"] if node["kind"] == kind]


@pytest.mark.parametrize("form", ["svg", "html", "dot", "graphml"])
def test_each_form_is_written(form: str, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / f"graph.{form}"
    said = run("graph", llama, "--out", out).stdout
    assert re.fullmatch(rf"14 boxes for \d+ operations, written to {re.escape(str(out))}\n", said)
    text = out.read_text("utf-8")
    assert "model.layers.{0..1}.mlp" in text
    if form in ("svg", "graphml"):
        ElementTree.fromstring(text)
    assert run("graph", llama, "--out", out, code=2).stderr == (
        f"error: {out}: it exists; give another --out, or --overwrite\n"
    )
    assert run("graph", llama, "--out", out, "--overwrite", "-q").stdout == ""
    assert out.read_text("utf-8") == text


def test_json_is_the_graph(llama: Path, tmp_path: Path) -> None:
    data = data_of(llama, "--out", tmp_path / "graph.dot")
    graph = nx.node_link_graph(data, edges="edges")
    assert graph.nodes["model.layers.0.mlp"]["d_ff"] == 64
    assert (tmp_path / "graph.dot").exists()


def test_around_a_layer(llama: Path) -> None:
    data = data_of(llama, "--around", "model.layers.1.mlp")
    assert [node["ops"] for node in facts_of(data, "ffn")] == [
        *("linear", "silu", "linear", "mul", "linear"),
    ]
    said = run("graph", llama, "--around", "model.layers.1.mpl", "--json", code=2).stderr
    assert said.startswith(
        "error: --around model.layers.1.mpl: the model runs no such layer; the nearest names are "
        "model.layers.1.mlp"
    )
    assert said.count("\n") == 1


def test_a_function_and_an_onnx_file(tmp_path: Path) -> None:
    named = data_of("small_models:plain", "--inputs", "small_models:plain_inputs")
    assert [(f["path"], f["count"]) for f in facts_of(named, "ffn")] == [("ffns.0", 2)]
    path = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    found = facts_of(data_of(path), "ffn")
    assert [(f["pattern"], f["d_ff"], f["count"]) for f in found] == [("MatMul_{3,9}", 32, 2)]
    out = tmp_path / "converted"
    run("convert", path, "--recipe", "sparse-upcycling", "--out", out, "-q")
    data = data_of(out)
    (layer,) = facts_of(data, "moe")
    assert (layer["pattern"], layer["num_experts"], layer["top_k"]) == ("MatMul_{3,9}", 8, 2)
    (left,) = facts_of(data, "operations")  # what is not of the layers: the residual additions
    assert (left["ops"], left["operations"], left["count"]) == ("add", 1, 2)


def test_a_native_directory_shows_its_experts(moe: Path) -> None:
    data = data_of(moe)
    (layer,) = facts_of(data, "moe")
    assert (layer["num_experts"], layer["width"], layer["top_k"], layer["count"]) == (8, 64, 2, 2)
    assert layer["router"] == "MixtralTopKRouter"
    assert data["graph"]["title"] == "llama-moe"
    assert data["graph"]["about"] == "2 MoE layers"
    assert not facts_of(data, "ffn")


def test_a_layer_between_siblings_is_where_it_was_put(bert_moe: Path) -> None:
    (layer,) = facts_of(data_of(bert_moe), "moe")
    assert layer["path"] == "bert.encoder.layer.0.output.dense"
    assert layer["router"].startswith("linear, top_k, ")


def test_a_plain_module_has_no_code_in_its_directory(tmp_path: Path) -> None:
    out = tmp_path / "moe"
    command = ("--recipe", "sparse-upcycling", "--inputs", "small_models:plain_inputs")
    run("convert", "small_models:plain", *command, "--target", "safetensors", "--out", out, "-q")
    said = run("graph", out, "--json", code=2).stderr
    assert "it has the weights of a plain module and not its code" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("{llama}",), 2, "--out is missing"),
        (("{llama}", "--out", "graph.png"), 2, "ends in .svg, .html, .dot or .graphml"),
        (("{llama}", "--out", "graph"), 2, "ends in .svg, .html, .dot or .graphml"),
        (("{llama}", "--out", "{llama}/config.json/graph.svg"), 2, "choose another --out"),
        (("{llama}", "--out", "{llama}"), 2, "is a directory"),
        (("no/such/model", "--json"), 2, "no/such/model"),
        (("{llama}", "--inputs", "small_models:wrong_inputs", "--json"), 4, "the forward fails"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: tuple[str, ...], code: int, words: str, llama: Path
) -> None:
    done = run("graph", *(part.format(llama=llama) for part in arguments), code=code)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


# The page.


def test_the_report_shows_where_the_layers_are(moe: Path, bert_moe: Path) -> None:
    for directory, parts in (
        (
            moe,
            (
                "model.layers.{0..1}.mlp",
                "32 → 2 \N{MULTIPLICATION SIGN} 64 → 32, swiglu",
                "8 experts of 64 neurons",
            ),
        ),
        (bert_moe, ("bert.encoder.layer.{0..1}", "32 → 64 → 32, gelu", "neurons")),
    ):
        (site,) = read_contents(directory).sites
        assert site.count == 2
        text = (directory / "report.html").read_text("utf-8")
        assert "Where the layers are" in text
        assert all(part in text for part in parts)
        assert "url(" not in text
    (site,) = read_contents(moe).sites
    assert site.squares == (True, True, *[False] * 6)
    assert (site.router, site.hidden) == ("top 2; linear, top_k, renormalised", 0)


def layer(path: str, **changes: Any) -> Any:
    made = {
        "num_experts": 4,
        "width": 8,
        "shared": 0,
        "d_model": 16,
        "d_out": 16,
        "pointwise": {"arity": 1, "name": "relu", "steps": []},
        "router": {"kind": "linear", "select": {"rule": "top_k", "k": 1}, "weights": "one"},
    }
    return page_case.origin(path, layer=made | changes)


def test_only_equal_neighbours_are_one_row() -> None:
    layers = [layer("a.0"), layer("a.1"), layer("a.2", shared=3), layer("a.3"), layer("b.0")]
    rows = sites_of(layers, "here")
    assert [(row.path, row.count) for row in rows] == [
        *(("a.{0..1}", 2), ("a.2", 1), ("a.3", 1), ("b.0", 1)),
    ]
    assert rows[1].experts == "4 experts of 8 neurons + 3 shared"
    many = sites_of([layer("a", num_experts=1000)], "here")[0]
    assert (len(many.squares), many.hidden) == (24, 976)


EVIL = '<script>alert("x")</script>\x00'


def test_rows_are_bounded_and_escaped() -> None:
    sites = sites_of([layer(f"{EVIL * 9}{i}.{'x' * (i % 2)}") for i in range(90)], "here")
    contents = page_case.contents()
    text = page(Contents(contents.report, "here", contents.kinds, contents.origin, None, sites))
    assert "50 more rows are in provenance.json" in text
    assert "<script" not in text
    assert "\x00" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("gone", ["router", "pointwise", "d_model"])
def test_a_damaged_provenance_is_one_sentence(gone: str) -> None:
    damaged = layer("a")
    del damaged["layer"][gone]
    with pytest.raises(UsageError, match="here: not what upcycle writes"):
        sites_of([damaged], "here")
    with pytest.raises(UsageError, match="here: not what upcycle writes"):
        sites_of([layer("a", num_experts="many")], "here")


def test_a_model_of_no_layers_has_no_rows() -> None:
    assert sites_of([], "here") == ()
    assert "Where the layers are" not in page(page_case.contents())
