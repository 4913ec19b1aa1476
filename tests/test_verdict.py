"""What is said of a result: its level, and sentences that hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
from command_line import run

from upcycle.ir.measured import Costs, Distance, LanguageModel, ModelDistance
from upcycle.ir.verdict import Verdict, verdict

GROWS = Costs(100, 200, 120, 10, 20, 0, 0, 400, 800, 1200)
SAVES = Costs(100, 101, 80, 10, 5, 0, 0, 400, 404, 800)


def measured(relative: float, cosine: float, factor: float | None = None) -> ModelDistance:
    language = None if factor is None else LanguageModel(2000, 0.1, 0.8, 10.0, 10.0 * factor)
    output = Distance(relative, relative, relative, cosine - 0.1, cosine)
    return ModelDistance("some text", {"last": output}, relative, language)


def scores(agreement: float, cosine: float) -> ModelDistance:
    found = measured(0.1, cosine)
    return replace(
        found, outputs={"logits": replace(found.outputs["last"], top1_agreement=agreement)}
    )


def judged(
    found: ModelDistance | None,
    promise: str = "approximate",
    costs: Costs = SAVES,
    recipe: str = "emoe",
) -> Verdict:
    return verdict(promise, costs, found, dtype="float32", recipe=recipe)


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (measured(1e-6, 1.0), "equal"),
        (measured(1e-6, 1.0, 1.0), "equal"),
        (measured(0.1, 0.98), "near"),
        (measured(0.1, 0.979), "changed"),
        (measured(0.5, 0.90), "changed"),
        (measured(0.5, 0.83), "far"),
        (measured(0.5, 0.5, 1.04), "near"),  # a language model is judged by its predictions
        (measured(0.5, 0.99, 1.3), "changed"),
        (measured(0.5, 0.99, 1.6), "far"),
        (scores(0.951, 0.5), "near"),  # and scores by their largest entry, whatever the cosine
        (scores(0.949, 0.999), "changed"),
        (scores(0.749, 0.999), "far"),
        (measured(float("inf"), float("nan"), float("inf")), "far"),
        (measured(float("nan"), float("nan")), "far"),
        (None, "unknown"),
    ],
)
def test_the_level(found: ModelDistance | None, level: str) -> None:
    assert judged(found).level == level


def test_the_level_depends_on_the_dtype() -> None:
    found = measured(1e-3, 0.9999)
    assert judged(found).level == "near"
    half = verdict("exact", SAVES, found, dtype="bfloat16", recipe="emoe")
    assert half.level == "equal"


def test_the_sentences() -> None:
    copies = judged(measured(8e-7, 1.0), "exact", GROWS, "sparse-upcycling")
    assert copies.headline == "exact, with 2.00 times the FFN work of a token"
    assert "2.00 times the parameters, 60% of them active" in copies.work
    assert copies.advice.startswith("Train it")
    far = judged(measured(0.6, 0.83))
    assert far.headline == "approximate: not for use before training"
    assert "`last` is 0.830 alike" in far.quality
    assert "the recipe upcycle" in far.advice
    assert "the recipe upcycle" not in judged(measured(0.6, 0.83), recipe="upcycle").advice
    text = judged(measured(0.6, 0.9, 1.29))
    assert "Perplexity is 1.29 times" in text.quality
    assert "80% of its next tokens are the same" in text.quality
    random = replace(measured(0.6, 0.9), inputs="random inputs")
    assert "which say little" in judged(random).quality
    planned = judged(None, "exact with all experts")
    assert planned.headline.startswith("not measured")
    assert "`upcycle convert` measures it." in planned.lines


def test_rounded_weights_save_bytes(tmp_path: Path) -> None:
    """Where all experts run, and only there the old sentence would be wrong."""
    same = measured(8e-7, 1.0)
    equal = replace(SAVES, flops_after=SAVES.flops_before)
    given = {"dtype": "float32", "recipe": "split-all"}
    plain = verdict("exact", equal, same, **given)
    assert plain.advice.startswith("It saves nothing by itself")
    assert plain.size == ""
    rounded = verdict("exact", equal, same, rounded_bytes=equal.bytes_before // 4, **given)
    assert "0.25 times the" in rounded.size
    assert rounded.advice.startswith("It saves bytes and no work")
    assert rounded.lines == (rounded.quality, rounded.work, rounded.size, rounded.advice)
    out = tmp_path / "out"
    options = ("--set", "onnx.weights=int8", "--recipe", "split-all", "--out", out)
    said = run("convert", "sample:bert-tiny", *options).stdout
    files = sum(path.stat().st_size for path in out.glob("model.onnx*"))
    assert json.loads((out / "report.json").read_text())["onnx"]["bytes"] == files
    assert "saves nothing" not in said
    assert "With its rounded weights the ONNX file takes" in said


def test_a_command_ends_with_it_and_the_report_has_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    target = ("--target", "safetensors")
    said = run("convert", "sample:bert-tiny", "--recipe", "factorllm", *target, "--out", out)
    *_, headline, quality, work, advice = said.stdout.splitlines()
    found = json.loads((out / "report.json").read_text("utf-8"))["verdict"]
    assert headline == f"verdict: {found['headline']}"
    assert [quality, work] == [f"  {found['quality']}", f"  {found['work']}"]
    assert found["level"] == "far"
    assert "of the largest entries of `logits` are those of the dense" in quality
    assert "Train it" in advice
    planned = json.loads(
        run(
            "plan",
            "sample:bert-tiny",
            "--recipe",
            "emoe",
            "--json",
            "--set",
            "layers.skip_first=0",
            "--set",
            "layers.start=1",
            "--set",
            "layers.every=1",
        ).stdout
    )
    assert planned["verdict"]["level"] == "unknown"


def test_a_streamed_result_is_judged_by_its_layers(tmp_path: Path) -> None:
    dense = small_models.saved("llama", tmp_path / "dense")
    found = {}
    for recipe in ("sparse-upcycling", "moefication"):
        out = tmp_path / recipe
        streamed = ("--stream", "--target", "safetensors", "--out", out)
        run(
            "convert",
            dense,
            "--recipe",
            recipe,
            *streamed,
            "--set",
            "experts.count=4",
            "--set",
            "router.top_k=2",
        )
        found[recipe] = json.loads((out / "report.json").read_text("utf-8"))["verdict"]
    assert found["sparse-upcycling"]["level"] == "equal"
    assert "the whole model was not run" in found["sparse-upcycling"]["quality"]
    assert found["moefication"]["level"] == "unknown"
    assert "`stream=False`" in found["moefication"]["advice"]
