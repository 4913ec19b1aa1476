"""The graph of a model as boxes: what is folded, what is coloured, and where it is placed."""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import graph_case
import networkx as nx
import pytest
import small_models
import torch
from torch import nn

import upcycle
from upcycle.capture.guess_inputs import find_example
from upcycle.drawing import layout as placing
from upcycle.drawing.dot import dot
from upcycle.drawing.draw import html, svg
from upcycle.drawing.layout import Layout, layout
from upcycle.drawing.operations import Operation, operations_of
from upcycle.drawing.repeats import pattern_of, repeats
from upcycle.drawing.rows import by_rows
from upcycle.drawing.write import graphml, write_graph
from upcycle.errors import CaptureError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
BUILD: dict[str, Callable[[], nn.Module]] = {
    **{name: getattr(graph_case, name) for name in ("llama", "t5", "albert", "fused")},
    "bert": small_models.bert,
    "in_turn": graph_case.InTurn,
}
X = (torch.zeros(2, 16),)


def graph_of(name: str, around: str | None = None) -> Any:
    model = BUILD[name]().eval()
    return upcycle.graph(model, around, X if name == "in_turn" else None)


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    return {name: graph_of(name) for name in BUILD}


@pytest.fixture
def no_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def of_kind(graph: Any, *kinds: str) -> dict[str, dict[str, Any]]:
    return {name: facts for name, facts in graph.nodes(data=True) if facts["kind"] in kinds}


# What repeats is written out.


@pytest.mark.parametrize("name", ["llama", "t5", "albert", "fused"])
def test_a_repeated_block_has_the_operations_that_it_has_when_it_is_recorded(name: str) -> None:
    model = BUILD[name]().eval()
    short = find_example(model)[1]
    whole = find_example(model, repeat_blocks=False)[1]
    assert short.replays
    assert len(short.graph.nodes) < len(whole.graph.nodes)
    found, there = operations_of(short, {}), operations_of(whole, {})

    def plain(operations: list[Operation]) -> list[Any]:
        place = {one.name: i for i, one in enumerate(operations)}
        return [
            (
                *(one.op, one.kind, one.path, one.shape, one.dtype, one.source, one.weights),
                [path for path, _ in one.steps],
                [place[name] for name in one.inputs],
            )
            for one in operations
        ]

    assert plain(found) == plain(there)


def test_neighbours_that_repeat_are_found() -> None:
    assert list(repeats("abcbcd")) == [(0, 1, 1), (1, 2, 2), (5, 1, 1)]
    assert list(repeats("aaab")) == [(0, 1, 3), (3, 1, 1)]
    assert list(repeats("")) == []
    assert list(repeats("aba")) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


@pytest.mark.parametrize(
    ("paths", "pattern"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], "a.{0..2}.b"),
        (["a.1", "a.3", "a.5"], "a.{1,3..5}"),
        (["a.1", "a.2", "a.4"], "a.{1,2,4}"),
        (["a.3", "a.9"], "a.{3,9}"),
        (["a.4", "a.3"], "a.{4,3}"),
        (["layer9", "layer10"], "layer{9..10}"),
        (["a", "a"], "a"),
        (["a.0.0", "a.1.1"], "a.0.0 to a.1.1"),
    ],
)
def test_paths_that_differ_in_a_number_are_one(paths: list[str], pattern: str) -> None:
    assert pattern_of(paths) == pattern


# The folded graph.


def test_a_llama_is_a_few_boxes(graphs: dict[str, Any]) -> None:
    graph = graphs["llama"]
    assert graph.number_of_nodes() < 16
    ((frame, facts),) = graph.graph["frames"].items()
    assert (facts["title"], facts["times"]) == ("model.layers.{0..4}", 5)
    inside = [name for name, held in graph.nodes(data=True) if held["frame"] == frame]
    assert [name.removeprefix("model.layers.0.") for name in inside] == [
        *("input_layernorm", "self_attn", "add_6"),
        *("post_attention_layernorm", "mlp", "add_8"),
    ]
    (ffn,) = of_kind(graph, "ffn").values()
    wanted = {
        "path": "model.layers.0.mlp",
        "pattern": "model.layers.{0..4}.mlp",
        "count": 5,
        "d_model": 32,
        "d_ff": 64,
        "d_out": 32,
        "expansions": 2,
        "activation": "swiglu",
        "weights": 3 * 32 * 64,
    }
    assert {name: ffn[name] for name in wanted} == wanted
    assert (graph.graph["title"], graph.graph["about"]) == ("LlamaForCausalLM", "5 FFNs")
    inputs = [facts["ops"] for facts in of_kind(graph, "input").values()]
    assert inputs == ["input_ids"]


@pytest.mark.parametrize("name", BUILD)
def test_every_operation_is_in_one_box(name: str, graphs: dict[str, Any]) -> None:
    graph = graphs[name]
    boxes = [f for _, f in graph.nodes(data=True) if f["kind"] not in ("input", "output")]
    assert sum(f["operations"] * f["count"] for f in boxes) == graph.graph["operations"]
    assert all(isinstance(v, str | int | bool) for f in boxes for v in f.values())
    drawn = nx.DiGraph((a, b) for a, b, facts in graph.edges(data=True) if not facts["next"])
    order = {box: i for i, box in enumerate(graph)}
    assert all(order[a] < order[b] for a, b in drawn.edges)


@pytest.mark.parametrize("name", ["llama", "t5", "in_turn", "bert", "fused"])
def test_the_boxes_of_ffns_are_those_that_are_located(name: str, graphs: dict[str, Any]) -> None:
    located = upcycle.locate(BUILD[name]().eval(), X if name == "in_turn" else None)
    boxes = of_kind(graphs[name], "ffn", "bottleneck", "head").values()
    count = Counter[str]()
    for box in boxes:
        count[box["kind"]] += box["count"]
    assert count == Counter(ffn.kind for ffn in located.ffns)
    assert {box["path"] for box in boxes} <= {ffn.path for ffn in located.ffns}


def test_a_block_hands_on_to_the_next_and_the_last_to_what_follows(graphs: dict[str, Any]) -> None:
    graph = graphs["llama"]
    later = {b: facts["next"] for _, b, facts in graph.out_edges("add_8", data=True)}
    assert later == {"model.layers.0.input_layernorm": True, "add_6": True, "model.norm": False}
    assert graph.edges["add_8", "model.norm"]["shape"] == "2x7x32"


def test_blocks_of_two_kinds_in_turn_are_folded_in_pairs(graphs: dict[str, Any]) -> None:
    graph = graphs["in_turn"]
    (frame,) = [facts for facts in graph.graph["frames"].values() if facts["times"] > 1]
    assert (frame["title"], frame["times"]) == ("blocks.{0,2..4} and blocks.{1,3..5}", 3)
    widths = [facts["d_ff"] for facts in of_kind(graph, "ffn").values()]
    assert widths == [32, 48]
    assert [facts["d_ff"] for facts in of_kind(graph, "bottleneck").values()] == [8]


def test_a_block_that_is_called_again_is_folded_too(graphs: dict[str, Any]) -> None:
    (frame,) = graphs["albert"].graph["frames"].values()
    assert (frame["title"], frame["times"]) == ("encoder.albert_layer_groups.0", 5)
    (ffn,) = of_kind(graphs["albert"], "ffn").values()
    assert ffn["count"] == 5


def test_the_first_block_of_t5_is_unlike_the_others(graphs: dict[str, Any]) -> None:
    frames = [(f["title"], f["times"]) for f in graphs["t5"].graph["frames"].values()]
    assert frames == [
        ("encoder.block.0", 1),
        ("encoder.block.{1..4}", 4),
        ("decoder.block.0", 1),
        ("decoder.block.{1..4}", 4),
    ]


def test_equal_blocks_with_other_weights_are_no_repeats() -> None:
    class Two(nn.Module):
        def __init__(self, widths: tuple[int, int]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(graph_case.Block(nn.ReLU(), width) for width in widths)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    times = [
        [frame["times"] for frame in upcycle.graph(Two(widths), None, X).graph["frames"].values()]
        for widths in ((32, 32), (32, 48))
    ]
    assert times == [[2], [1, 1]]


def test_an_ffn_of_siblings_is_a_box_between_the_others(graphs: dict[str, Any]) -> None:
    graph = graphs["bert"]
    (ffn,) = of_kind(graph, "ffn")
    assert graph.nodes[ffn]["placement"] == "siblings"
    before, after = "bert.encoder.layer.0.attention", "bert.encoder.layer.0.output"
    assert [*graph.predecessors(ffn)] == [before]
    assert [*graph.successors(ffn)] == [after]
    assert "bert.encoder.layer.0.intermediate" not in graph


def test_a_miss_is_at_its_node_with_its_reason(graphs: dict[str, Any]) -> None:
    boxes = graphs["bert"].nodes(data=True)
    missed = {name: facts["miss"] for name, facts in boxes if "miss" in facts}
    assert missed == {
        "cls.predictions.transform.LayerNorm": "cls.predictions.decoder: `layer_norm` mixes the "
        "hidden axis"
    }
    assert "miss" not in str(graphs["llama"].nodes(data=True))
    graph = upcycle.graph(graph_case.Refused(), None, X)
    (box,) = [facts for _, facts in graph.nodes(data=True) if "miss" in facts]
    assert box["miss"].startswith("blocks.{0..3}.values: `softmax` mixes the hidden axis")
    assert box["count"] == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_miss_without_a_node_is_told_beside() -> None:
    model = nn.Sequential(nn.Linear(16, 16), torch.jit.script(graph_case.Block(nn.ReLU(), 32)))
    graph = upcycle.graph(model, None, X)
    assert "1: it is a ScriptModule" in graph.graph["elsewhere"]
    assert "it is a ScriptModule" in svg(graph)


def test_a_head_is_one() -> None:
    model = small_models.t.RobertaForSequenceClassification(
        small_models.t.RobertaConfig(vocab_size=300, **small_models.ENCODER)
    )
    (head,) = of_kind(upcycle.graph(model.eval()), "head").values()
    assert (head["path"], head["d_out"]) == ("classifier", 2)


def test_a_model_that_is_one_ffn_is_one_box() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    graph = upcycle.graph(model, None, X)
    assert [facts["kind"] for _, facts in graph.nodes(data=True)] == ["input", "ffn", "output"]


# A layer from inside.


def test_around_shows_the_operations_and_their_neighbours() -> None:
    graph = graph_of("llama", "model.layers.3.mlp")
    assert [(f["ops"], f["outside"]) for _, f in graph.nodes(data=True)] == [
        ("mul", True),
        ("linear", False),
        ("silu", False),
        ("linear", False),
        ("mul", False),
        ("linear", False),
        ("add", True),
    ]
    inside = [f for _, f in graph.nodes(data=True) if not f["outside"]]
    assert {f["kind"] for f in inside} == {"ffn"}
    assert inside[0]["parameters"] == "model.layers.3.mlp.gate_proj.weight"
    assert all(f["source"] for f in inside)
    assert graph.number_of_edges() == 7
    ((_, frame),) = graph.graph["frames"].items()
    assert (frame["title"], frame["d_ff"]) == ("model.layers.3.mlp", 64)


def test_around_a_block_has_frames_for_its_modules() -> None:
    graph = graph_of("llama", "model.layers.{0..4}")
    frames = graph.graph["frames"].values()
    titles = [frame["title"].removeprefix("model.layers.0") for frame in frames]
    assert titles == ["", ".input_layernorm", ".self_attn", ".post_attention_layernorm", ".mlp"]
    neighbours = {f["path"] for _, f in graph.nodes(data=True) if f["outside"]}
    assert neighbours == {
        *("model.embed_tokens", "model.rotary_emb", "model"),
        *("model.layers.1", "model.layers.1.input_layernorm"),
    }


def test_around_an_ffn_of_siblings_is_the_block_with_the_ffn_in_it() -> None:
    graph = graph_of("bert", "bert.encoder.layer.1")
    assert len(of_kind(graph, "ffn")) == 3
    assert [f["d_ff"] for f in graph.graph["frames"].values() if "d_ff" in f][-1:] == [64]


@pytest.mark.parametrize(
    ("layer", "near"), [("model.layer.0.mpl", "model.layers.0.mlp"), ("", "model.layers.0.mlp")]
)
def test_an_unknown_layer_is_one_sentence_with_the_nearest(layer: str, near: str) -> None:
    with pytest.raises(UsageError, match="the model runs no such layer; the nearest names") as told:
        graph_of("llama", layer)
    assert near in str(told.value)


# Mixtures of experts.


def test_a_converted_model_shows_its_moe_layers(graphs: dict[str, Any]) -> None:
    converted = upcycle.convert(
        graph_case.llama().eval(), "sparse-upcycling", overrides=["layers.every=2"], verify=False
    )
    graph = upcycle.graph(converted.model)
    boxes = of_kind(graph, "moe").values()
    assert sum(box["count"] for box in boxes) == 2
    facts = ("num_experts", "width", "top_k", "shared")
    assert {tuple(box[name] for name in facts) for box in boxes} == {(8, 64, 2, 0)}
    assert {box["router"] for box in boxes} == {"linear, top_k, renormalised"}
    assert sum(box["count"] for box in of_kind(graph, "ffn").values()) == 3
    assert "MoE: 8 experts of 64 neurons" in svg(graph)
    assert not [facts for _, facts in graph.nodes(data=True) if "miss" in facts]
    assert graph.graph["about"] == "3 FFNs, 2 MoE layers"


# Where everything is.


def overlaps(a: Any, b: Any) -> bool:
    return bool(a.x < b.right and b.x < a.right and a.y < b.bottom and b.y < a.bottom)


@pytest.mark.parametrize("name", BUILD)
def test_without_graphviz_no_box_is_on_another(name: str, graphs: dict[str, Any]) -> None:
    graph = graphs[name]
    placed = by_rows(graph)
    assert not [1 for a, b in combinations(placed.boxes.values(), 2) if overlaps(a, b)]
    in_frames(graph, placed)
    for a, b, facts in graph.edges(data=True):
        assert ((a, b) in placed.arrows) is not facts["next"]
    for box in placed.boxes.values():
        assert min(box.x, box.y) >= 0
        assert box.right <= placed.width
        assert box.bottom <= placed.height
    assert by_rows(graph) == placed


def in_frames(graph: Any, placed: Layout) -> None:
    """Boxes are inside of their frames, and outside of all others."""
    for name, facts in graph.nodes(data=True):
        chain, frame = set(), facts["frame"]
        while frame:
            chain.add(frame)
            frame = graph.graph["frames"][frame]["inside"]
        for key, area in placed.frames.items():
            box = placed.boxes[name]
            inside = area.x < box.x and area.y < box.y
            inside = inside and box.right < area.right and box.bottom < area.bottom
            assert inside is (key in chain)
            assert inside or not overlaps(box, area)


def test_rows_go_down_and_arrows_keep_out_of_boxes(graphs: dict[str, Any]) -> None:
    placed = by_rows(graphs["llama"])
    for (a, b), path in placed.arrows.items():
        assert placed.boxes[a].bottom < placed.boxes[b].y
        assert re.fullmatch(r"M[-\d. ]+(?:[CLQ][-\d. ]+)+", path), path


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_graphviz_places_the_boxes_where_it_is_installed(name: str, graphs: dict[str, Any]) -> None:
    placed = layout(graphs[name])
    assert placed != by_rows(graphs[name])
    assert not [1 for a, b in combinations(placed.boxes.values(), 2) if overlaps(a, b)]
    in_frames(graphs[name], placed)
    assert all(path.startswith("M") and "C" in path for path in placed.arrows.values())


def test_what_dot_says_is_read(
    graphs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(graph_case.fake_dot(tmp_path / "bin")))
    placed = layout(graphs["bert"])
    assert [box.y for box in placed.boxes.values()] != [
        box.y for box in by_rows(graphs["bert"]).boxes.values()
    ]
    assert len({box.middle for box in placed.boxes.values()}) == 1
    assert set(placed.arrows.values()) == {"M13 14C15 16 17 18 19 20"}
    assert [(f.width, f.height) for f in placed.frames.values()] == [(600.0, 900.0)]


@pytest.mark.parametrize(
    "program",
    [
        "print('{')",
        "print('{}')",
        "import sys; sys.exit(1)",
        "import time; time.sleep(60)",
        'print(\'{"bb": "0,0,1,1", "objects": []}\')',
    ],
)
def test_a_dot_that_fails_is_done_without(
    program: str,
    graphs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("upcycle.drawing.graphviz.SECONDS", 2.0)
    monkeypatch.setenv("PATH", str(graph_case.fake_dot(tmp_path / "bin", program)))
    assert layout(graphs["bert"]) == by_rows(graphs["bert"])
    assert "graphviz's dot gave no layout" in caplog.text


def test_no_name_of_the_model_reaches_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = f"import sys; open({str(tmp_path / 'text')!r}, 'w').write(sys.stdin.read())"
    monkeypatch.setenv("PATH", str(graph_case.fake_dot(tmp_path / "bin", copy)))
    layout(upcycle.graph(graph_case.Named(), None, X))
    text = (tmp_path / "text").read_text()
    assert "n1 [width=" in text
    assert "script" not in text
    assert "alert" not in text


# The files.


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


@pytest.mark.usefixtures("no_dot")
@pytest.mark.parametrize("name", BUILD)
def test_svg_is_xml_with_a_title_for_each_box(name: str, graphs: dict[str, Any]) -> None:
    root = ElementTree.fromstring(svg(graphs[name]))
    space = {"s": "http://www.w3.org/2000/svg"}
    nodes = [g for g in root.iterfind(".//s:g", space) if g.get("class", "").startswith("node")]
    assert len(nodes) == graphs[name].number_of_nodes()
    assert all(g.find("s:title", space) is not None for g in nodes)
    kinds = Counter(g.get("class", "").split()[1] for g in nodes)
    facts = [held for _, held in graphs[name].nodes(data=True)]
    assert kinds == Counter("missed" if "miss" in held else held["kind"] for held in facts)
    style = root.findtext("s:style", namespaces=space) or ""
    fills = dict(re.findall(r"\.graph \.(\w+) rect, .*fill: (#\w+);", style))
    assert len({fills[kind] for kind in ("ffn", "bottleneck", "head", "moe", "missed")}) == 5


@pytest.mark.usefixtures("no_dot")
def test_what_a_model_says_is_shown_and_nothing_else() -> None:
    graph = upcycle.graph(graph_case.Named(), None, X)
    picture, page = svg(graph), html(graph)
    ElementTree.fromstring(picture)
    assert set(Reader(page).tags) <= set(Reader(html(graph_of("bert"))).tags)
    assert Reader(page).tags.count("script") == 1
    for text in (picture, page, dot(graph), graphml(graph)):
        text.encode("utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e\uffff]", text)
    for text in (picture, page, graphml(graph)):
        assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in picture
    assert "{{ 7 * 191 }}" in picture
    names = re.findall(r'"(?:[^"\\]|\\.)*"', dot(graph))
    assert any(r"<script>alert(\"x\")</script>\\N'\\x1b[31m\\x00" in name for name in names)


def test_a_page_loads_nothing(graphs: dict[str, Any]) -> None:
    page = html(graphs["bert"])
    read = Reader(page)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(read.tags)
    assert not {"src", "href"} & set(read.attributes)
    assert not [name for name in read.attributes if name.startswith("on")]
    assert set(re.findall(r"https?://[^\"<]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_graphml_is_read_again(name: str, graphs: dict[str, Any], tmp_path: Path) -> None:
    again = nx.read_graphml(write_graph(graphs[name], tmp_path / "graph.graphml"))
    assert dict(again.nodes(data=True)) == dict(graphs[name].nodes(data=True))
    assert list(again.edges(data=True)) == list(graphs[name].edges(data=True))
    assert json.loads(again.graph["frames"]) == graphs[name].graph["frames"]
    assert again.graph["title"] == graphs[name].graph["title"]


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
@pytest.mark.parametrize("model", ["bert", "evil"])
def test_graphviz_reads_the_dot_file(model: str, graphs: dict[str, Any]) -> None:
    graph = graphs["bert"] if model == "bert" else upcycle.graph(graph_case.Named(), None, X)
    command = ["dot", "-Tplain"]
    ran = subprocess.run(command, input=dot(graph), capture_output=True, text=True, check=True)
    assert ran.stdout.count("\nnode ") == graph.number_of_nodes()
    assert not ran.stderr


def test_the_name_of_the_file_says_the_form(graphs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.svg, \.html, \.dot or \.graphml"):
        write_graph(graphs["bert"], tmp_path / "graph.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="it cannot be written"):
        write_graph(graphs["bert"], tmp_path / "file" / "graph.dot")
    assert write_graph(graphs["bert"], tmp_path / "new" / "Graph.DOT").read_text()[:7] == "digraph"


def test_a_model_that_cannot_be_run_is_one_sentence() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="reads a value that depends on weights"):
        upcycle.graph(Reads(), None, X)


def test_layout_asks_for_dot_only_if_it_may(
    graphs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing.shutil, "which", lambda name: pytest.fail("it was looked for"))
    assert layout(graphs["bert"], by_graphviz=False) == by_rows(graphs["bert"])
