"""report.html: what it tells of a report, that it is one file, and that it is never code."""

import html
import json
import math
import re
import webbrowser
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import command_line
import onnx_files
import page_case
import pytest
from click.testing import CliRunner
from transformers import BertConfig, BertModel

from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.ir.measured import Check, ModelDistance
from upcycle.ir.report import HubSource, plain
from upcycle.page import charts, heat
from upcycle.page.measured import measured
from upcycle.page.origins import first_split, kinds_of
from upcycle.page.page import Contents, page, read_contents
from upcycle.targets.description import read_report
from upcycle.targets.provenance_file import runs_of

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "written_before" / "native"
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """The texts by their element, and all elements; an end that has no beginning raises."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def words(contents: Contents) -> str:
    """The page without its markup, spaces joined."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page(contents), flags=re.S)
    return " ".join(html.unescape(text).split())


def test_it_tells_what_was_measured_in_order() -> None:
    read = Reader(page(page_case.contents()))
    assert read.texts["h1"] == ["some-model"]
    assert read.texts["h2"] == [
        *("Checks", "Error layer by layer", "Load of every expert", "Quality against work"),
        *("Size and speed", "What the experts are made of", "Recipe"),
        "Files, software and versions",
    ]
    text = words(page_case.contents())
    for part in (
        *("checks held 2 of 2", "3e-07 1e-05", "✓ yes"),
        *("The worst is model.layers.1.mlp with 0.02", "Counted on two poems", "1 of 8 experts"),
        *("mean cosine of logits 0.97 at 60% of the FLOPs", "4.0 kB 4.4 kB 1.10"),
        *("model.layers.0.mlp to model.layers.1.mlp (2 layers)", "100% in one expert"),
        *("method: cluster", "no, act: its kernel is another", "upcycle 0.1.0 with torch 2.13.0"),
    ):
        assert part in text, part


def test_the_verdict_comes_first() -> None:
    verdict = page_case.report().verdict
    text = words(page_case.contents())
    assert f"{verdict.headline[1:]}." in text
    for line in verdict.lines:
        assert " ".join(line.replace("`", " ").split()) in text
    assert text.index(verdict.lines[0].replace("`", "")[-20:]) < text.index("checks held")


def test_scores_are_judged_by_their_largest_entry() -> None:
    """As in the verdict: their cosine says nothing, so they have no place among cosines."""
    end = page_case.report().end_to_end
    assert end
    scores = replace(end.outputs["logits"], top1_agreement=0.64)
    both = replace(end, outputs={"logits": scores, "pooled": end.outputs["logits"]})
    text = words(page_case.contents(end_to_end=replace(end, outputs={"logits": scores})))
    assert "same largest entry of logits 64.0% 100% is the dense model" in text
    assert "Quality against work" not in text
    assert "mean cosine of pooled 0.97 at" in words(page_case.contents(end_to_end=both))
    assert "same largest entry" not in words(page_case.contents())


def test_a_failed_check_says_so_in_words() -> None:
    checks = (Check("end to end", 2.0, 1.0, False), Check("endless", math.inf, 1.0, False))
    text = words(page_case.contents(checks=checks))
    assert "checks held 0 of 2" in text
    assert "end to end 2 1 ✗ no" in text
    assert "endless infinite 1 ✗ no" in text


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"layers": None}, ["Error layer by layer", "Load of every expert"]),
        ({"end_to_end": None}, ["Quality against work"]),
        ({"costs": None}, ["Quality against work", "Size and work", "active parameters"]),
        ({"costs": replace(page_case.COSTS, flops_left_dense=None)}, ["Quality against work"]),
        ({"checkpoint": None}, ["vllm"]),
    ],
)
def test_what_is_not_known_is_left_out(changes: dict[str, Any], gone: list[str]) -> None:
    there, less = words(page_case.contents()), words(page_case.contents(**changes))
    assert all(part in there and part not in less for part in gone)


def test_without_verification_it_says_so() -> None:
    bare = page_case.report(checks=(), layers=None, end_to_end=None)
    assert "The conversion was not verified: nothing is known" in words(Contents(bare))
    assert "What the experts are made of" not in words(Contents(bare))  # nor without provenance


def test_one_file_that_loads_nothing() -> None:
    text = page(page_case.contents())
    read = Reader(text)
    tags = {tag for tag, _ in read.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "use"}
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    names = {name for _, attributes in read.seen for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href")}
    policy = [a["content"] for _, a in read.seen if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_picture_and_table_has_a_name() -> None:
    read = Reader(page(page_case.contents()))
    ids = {attributes["id"] for _, attributes in read.seen if "id" in attributes}
    assert len(ids) == sum("id" in attributes for _, attributes in read.seen)
    for tag, attributes in read.seen:
        if tag == "svg":
            named = attributes.get("aria-labelledby") or ""
            hidden = attributes.get("aria-hidden") or attributes.get("aria-label")
            assert hidden or (named and set(named.split()) <= ids)
        if tag == "section" and attributes.get("aria-labelledby"):
            assert attributes["aria-labelledby"] in ids
    tables = [tag for tag, _ in read.seen if tag in ("table", "caption")]
    assert tables == ["table", "caption"] * (len(tables) // 2)
    assert all(attributes.get("scope") for tag, attributes in read.seen if tag == "th")


def test_colours_differ_in_lightness_and_figures_stand_out() -> None:
    """A heat map that is read without colours: light and dark, each step by its luminance."""
    css = (ROOT / "upcycle/page/templates/style.css").read_text("utf-8")
    for block in re.findall(r":root \{(.*?)\}", css, flags=re.S):
        colour = dict(re.findall(r"--([\w]+): (#\w+)", block))
        steps = [_luminance(colour[f"h{i}"]) for i in range(1, 7)]
        assert steps in (sorted(steps), sorted(steps, reverse=True))
        figures = {**dict.fromkeys("123", "on"), "4": "on4", **dict.fromkeys("56", "over")}
        pairs = [(figure, f"h{step}") for step, figure in figures.items()]
        for front, back in [
            *pairs,
            *((name, "paper") for name in ("ink", "soft", "accent", "bad")),
        ]:
            light = sorted((_luminance(colour[front]), _luminance(colour[back])))
            assert (light[1] + 0.05) / (light[0] + 0.05) >= 4.5, (front, back)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


EVIL = '<script>alert("x")</script>\x1b[31m\x00\u202e\ud800{{ 7 * 191 }}\' onload=x'


def test_what_files_say_is_shown_and_nothing_else() -> None:
    report = page_case.report()
    assert report.layers
    assert report.end_to_end
    hostile = replace(
        report,
        **dict.fromkeys(("upcycle", "model", "recipe", "promise", "torch", "streamed"), EVIL),
        resolved_recipe={EVIL: [EVIL]},
        checks=(Check(EVIL, 1.0, 2.0, True),),
        source=HubSource(EVIL, EVIL, EVIL),
        calibration=replace(page_case.calibrated((1, 2)), data=EVIL),
        checkpoint=replace(
            report.checkpoint,
            form=EVIL,
            architecture=EVIL,
            runtimes={EVIL: {"level": "no", "why": [EVIL], "field": EVIL}},
        ),
        layers=tuple(
            replace(row, path=f"{EVIL}{i}", promise=EVIL) for i, row in enumerate(report.layers)
        ),
        end_to_end=ModelDistance(EVIL, {EVIL: report.end_to_end.outputs["logits"]}, 0.2),
    )
    named = dict.fromkeys(("path", "method", "router"), EVIL)
    origins = [page_case.origin(**named, sources=[EVIL] * 4)]
    text = page(Contents(hostile, "", tuple(kinds_of(origins, "")), first_split(origins)))
    tags = {tag for tag, _ in Reader(text).seen}
    assert tags == {tag for tag, _ in Reader(page(page_case.contents())).seen} | {"pre"}
    assert not any(attribute.startswith("on") for _, a in Reader(text).seen for attribute in a)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "&lt;script&gt;" in text
    assert "\\x1b[31m\\x00\\u202e\\ud800{{ 7 * 191 }}" in html.unescape(text)
    text.encode("utf-8")


@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (80, 64), (1, 1), (3, 5000), (900, 16)])
def test_its_size_is_bounded(layers: int, experts: int) -> None:
    text = page(page_case.contents(layers, experts))
    assert len(text.encode()) < 1_000_000
    Reader(text)


def test_long_texts_are_cut() -> None:
    text = page(page_case.contents(model="m" * 10**6, resolved_recipe={"x": ["y" * 10**5] * 10**3}))
    assert len(text) < 500_000
    assert "m" * 300 + "…" in text


def test_figures_stand_in_the_cells_while_there_is_room() -> None:
    few, many = heat.load_of(page_case.report(2, 4)), heat.load_of(page_case.report(80, 64))
    assert few
    assert many
    assert [text for *_, text, _ in few.heat.texts][:4] == ["0", "0.7", "1.3", "2.0"]
    assert many.heat.texts == ()
    assert many.heat.rows[7].title == (
        "model.layers.7.mlp: 0 to 60, 10 idle tokens per expert, the most to expert 6"
    )


def test_many_experts_share_a_cell() -> None:
    load = heat.load_of(page_case.report(1, 1000))
    assert load
    assert (load.heat.columns, load.heat.pooled) == (250, 4)
    assert "Each cell is the mean of 4 neighbouring experts" in words(page_case.contents(1, 1000))


def test_the_load_is_that_of_real_tokens() -> None:
    """Where a layer was verified on random tokens, the calibration data tell more."""
    report = page_case.report()
    assert report.layers
    on_noise = tuple(replace(row, inputs="random tokens") for row in report.layers)
    noise = heat.load_of(replace(report, layers=on_noise))
    assert noise
    assert noise.data == "random tokens"
    calibration = page_case.calibrated((3, 5), (4, 4))
    told = heat.load_of(replace(report, layers=on_noise, calibration=calibration))
    assert told
    assert told.data == "the calibration data: novels"
    assert told.heat.rows[0].end == "3 to 5"
    real = heat.load_of(replace(report, calibration=calibration))
    assert real
    assert real.data == "two poems"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["model.layers.0.mlp", "model.layers.11.mlp"], ["0", "11"]),
        (["encoder.0.ff", "decoder.0.ff"], ["encoder", "decoder"]),
        (["a.b", "a.b.c"], ["", "c"]),
        (["mlp"], ["mlp"]),
        (["x", "x"], ["x", "x"]),
        (["a_very_long_name_of_it.0"], ["…_name_of_it.0"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert heat.short_names(paths) == names


def test_the_measured_points_are_those_of_the_documentation() -> None:
    for kind, column in (("perplexity", "both"), ("cosine", "mean cosine")):
        known = measured()[kind]
        rows = json.loads((ROOT / known.source).with_suffix(".json").read_text("utf-8"))
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["recipe"] != "dense":
                point = (round(row["flops"], 4), float(f"{row[column]:.4g}"))
                found.setdefault(row["recipe"], []).append(point)
        assert known.points == {name: tuple(sorted(points)) for name, points in found.items()}


def test_quality_is_that_of_all_ffns_and_says_whose_lines_they_are() -> None:
    chart = charts.quality_chart(page_case.report())
    assert chart
    assert (chart.work, chart.value) == (0.6, 0.97)
    assert "That is another model and another text" in words(page_case.contents())
    minilm = page_case.contents(model="sample:minilm")
    assert "That is this dense model, on other text" in words(minilm)
    end = replace(page_case.report().end_to_end, language_model=page_case.WORDS)
    chart = charts.quality_chart(page_case.report(end_to_end=end))
    assert chart
    assert (chart.what, chart.value) == ("perplexity over the dense one", 1.5)
    assert "8 measured points are worse" not in words(page_case.contents())


def test_copies_are_one_row_without_a_picture() -> None:
    copies = [
        page_case.origin(f"layers.{i}", experts=["0-31"] * 8, layer={"width": 32, "shared": 0})
        for i in range(3)
    ]
    (kind,) = kinds_of(copies, "here")
    assert kind.paths == ("layers.0", "layers.1", "layers.2")
    assert kind.experts == "8 of 32 neurons"
    assert kind.parts == (("in all experts", 1.0, 1.0),)
    assert first_split(copies) is None


def test_the_parts_of_a_split() -> None:
    layer = page_case.origin(
        experts=["0-7 zero*2", "4-11 new*2"],
        shared="12-15",
        layer={"width": 10, "shared": 4, "low_rank": 3},
        sources=["chat", "code"],
    )
    (kind,) = kinds_of([layer], "here")
    assert kind.experts == "2 of 10 neurons, 1 shared of 4, a linear map of rank 3"
    assert {name: share for name, share, _ in kind.parts} == {
        "in one expert": 8 / 32,
        "in several experts": 4 / 32,
        "in the shared expert": 4 / 32,
        "in no expert": 16 / 32,
    }
    assert (kind.extra, kind.sources) == ("10% padding, 10% new", ("chat", "code"))
    found = first_split([layer])
    assert found
    assert found.names == ("shared", "expert 0", "expert 1")
    assert found.share_EB[0] == (0,) * 12 + (1,) * 4 + (0,) * 16


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": ["0-40"] * 4},
        {"experts": ["0-7 0-7"] * 4},
        {"experts": ["x"] * 4},
        {"experts": ["5-1"] * 4},
        {"experts": []},
        {"dense_neurons": 2**60},
        {"dense_neurons": 0},
        {"layer": {"width": 8}},
        {"layer": {"width": "many", "shared": 0}},
    ],
)
def test_a_damaged_provenance_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^here: not what upcycle writes .*; convert the model"):
        kinds_of([page_case.origin(**changes)], "here")


def test_runs_are_read_one_by_one() -> None:
    assert [*runs_of("0-383 500 zero*2 new*3")] == [(0, 384), (500, 1), (-1, 2), (-2, 3)]
    with pytest.raises(ValueError, match="no neurons"):
        list(runs_of("zero*0"))


@pytest.mark.parametrize("name", ["native", "self_contained"])
def test_reports_of_earlier_versions_are_shown(name: str) -> None:
    contents = read_contents(OLD.parent / name)
    assert contents.report.model in words(contents)


def moved(tmp_path: Path, **changes: Any) -> Path:
    """A converted directory that has a report only, changed."""
    data = read_report(OLD).to_json() | changes
    (tmp_path / "report.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["report", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_the_page_again(tmp_path: Path) -> None:
    folder = moved(tmp_path)
    assert run(folder) == (0, f"written to {folder / 'report.html'}\n", "")
    again = tmp_path / "again.html"
    assert run(folder, "--out", again)[0] == 0
    assert again.read_bytes() == (folder / "report.html").read_bytes()
    assert again.read_text("utf-8") == page(read_contents(folder))


def test_json_is_the_report_and_writes_nothing(tmp_path: Path) -> None:
    folder = moved(tmp_path)
    code, out, _ = run(folder, "--json")
    assert code == 0
    report = read_report(folder)
    assert json.loads(out) == report.to_json()
    assert json.loads(out)["verdict"]["headline"] == report.verdict.headline
    assert not (folder / "report.html").exists()


def test_a_browser_is_opened_on_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or False)
    folder = moved(tmp_path)
    run(folder)
    assert opened == []
    code, _, said = run(folder, "--open")
    assert (code, opened) == (0, [(folder / "report.html").as_uri()])
    assert "no browser was found here" in said


BENCH = {
    "model": "placeholder",
    "recipe": "placeholder",
    "engine": "torch",
    "machine": {"dtype": "float32", "threads": 2, "flops": 1e9},
    "reading": [
        {"tokens": None, **{name: {"median": 0.02} for name in ("dense", "converted")},
         "ratio": {"median": 0.8}}
    ],
    "writing": None,
}  # fmt: skip


def test_a_benchmark_beside_the_report_is_shown(tmp_path: Path) -> None:
    folder = moved(tmp_path)
    assert "Speed was not measured" in words(read_contents(folder))
    report = read_report(folder)
    ours = BENCH | {"model": report.model, "recipe": report.recipe}
    (folder / "bench.json").write_text(json.dumps(ours))
    text = words(read_contents(folder))
    assert "reads one batch 20.00 ms 20.00 ms 1.25" in text
    assert "Speed was not measured" not in text


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("report.json", "{", "report.json: not JSON"),
        ("report.json", "{}", "report.json: not a report of upcycle"),
        ("provenance.json", '{"layers": 3}', "provenance.json: not what this version of upcycle"),
        ("bench.json", "[]", "bench.json: not a JSON object"),
        ("bench.json", '{"model": 1}', "bench.json: not the JSON of `upcycle bench`"),
        ("bench.json", json.dumps(BENCH), "bench.json: it is the benchmark of placeholder"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, file: str, text: str, sentence: str
) -> None:
    folder = moved(tmp_path)
    (folder / file).write_text(text)
    code, out, said = run(folder)
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert sentence in said
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"costs": {**vars(page_case.COSTS), "parameters_after": 10**4000}},
        {"costs": vars(page_case.COSTS), "end_to_end": {**plain(page_case.report().end_to_end),
                        "language_model": {**vars(page_case.WORDS), "dense_perplexity": 0}}},
        {"checkpoint": {"form": "", "architecture": "", "not_native_because": {},
                        "runtimes": {"vllm": {"level": "perhaps"}}}},
    ],
)  # fmt: skip
def test_impossible_figures_are_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    code, _, said = run(moved(tmp_path, **changes))
    assert (code, said.count("\n")) == (2, 1)
    assert "not those of a conversion" in said


@pytest.mark.parametrize("way", ["--no-stream", "--stream", "onnx"])
def test_convert_writes_what_report_writes(tmp_path: Path, way: str) -> None:
    """All ways of a conversion end in one place; the page is the same when it is made again."""
    out = tmp_path / "moe"
    if way == "onnx":
        dense = onnx_files.by_hand(tmp_path / "dense.onnx", "relu")
    else:
        dense = tmp_path / "dense"
        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 99}
        BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
            dense
        )
    options = ["--target", "safetensors", way] if way != "onnx" else []
    recipe = ["--recipe", "split-all", "--set", "experts.count=4", "--set", "router.top_k=4"]
    command_line.run("convert", dense, "--out", out, *recipe, *options)
    made = (out / "report.html").read_bytes()
    assert ("layer by layer (" in made.decode("utf-8")) is (way == "--stream")
    assert b"Load of every expert" in made
    assert str(tmp_path) not in made.decode("utf-8")
    assert run(out)[0] == 0
    assert (out / "report.html").read_bytes() == made


def test_a_directory_without_a_report_is_refused(tmp_path: Path) -> None:
    code, _, said = run(tmp_path)
    assert code == 2
    assert "no report.json, so this is not an output of upcycle" in said
