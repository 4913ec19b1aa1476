"""Every recipe that copies FFNs, or takes them from other models, from conversion to files."""

from pathlib import Path

import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner

import upcycle
from upcycle.cli.main import main
from upcycle.models.named import open_model
from upcycle.recipe.shipped import recipe_names

SOURCES = {"btx": 4, "clip-moe": 4, "uni-moe": 4, "medplib": 2}
ALTERED = ["drop-upcycling", "noise-upcycling", *SOURCES]
EXACT = ["residual-moe", "moe-llava"]
# A graph has the sizes and the weight rule of a recipe, and not where its weights are from: one
# recipe with two renormalised experts, one with the softmax of one, one with an expert that every
# token visits, and one that leaves a layer dense.
WITH_ONNX = {"drop-upcycling", "medplib", "residual-moe", "moe-llava"}


@pytest.mark.parametrize("name", [*ALTERED, *EXACT, "sepit"])
def test_a_recipe_becomes_files_that_compute_the_same(name: str, tmp_path: Path) -> None:
    assert name in recipe_names()
    model = small_models.build("llama")
    sources = [small_models.build("llama", seed) for seed in range(SOURCES.get(name, 0))]
    done = upcycle.convert(model, name, sources=sources)
    assert done.plan.promise == ("exact" if name in EXACT else "approximate")
    relative = done.report.end_to_end.relative
    assert relative < 1e-5 if name in EXACT else relative > 1e-3
    targets = ["safetensors", "onnx"] if name in WITH_ONNX else ["safetensors"]
    done.save(tmp_path / name, targets=targets)  # tiers T3 and T4
    assert all(check.passed for check in done.report.checks)
    assert done.report.checkpoint.form == "native", done.report.checkpoint
    loaded = upcycle.load(tmp_path / name)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = done.model(input_ids=tokens).logits
        for other in (loaded, again.eval()):
            found = other(input_ids=tokens).logits
            # Two layers of sums of at most 128 products, in another order.
            bound = 300 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (found - expected).abs().max() < bound


@pytest.mark.parametrize("name", ["drop-upcycling", "noise-upcycling", "residual-moe", "sepit"])
def test_a_recipe_converts_a_real_encoder(name: str) -> None:
    source = open_model("sample:bert-tiny")
    done = upcycle.convert(source.load(), name, source=source)
    assert all(check.passed for check in done.report.checks)


@pytest.mark.parametrize("name", ["drop-upcycling", "noise-upcycling", "residual-moe"])
def test_a_streamed_conversion_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    dense = small_models.saved("llama", tmp_path / "dense", with_tokenizer=True)
    for stream in ("--stream", "--no-stream"):
        arguments = ["convert", str(dense), "--recipe", name, "--out", str(tmp_path / stream)]
        result = CliRunner().invoke(main, [*arguments, stream, "--target", "safetensors"])
        assert result.exit_code == 0, result.output
    one, other = (tmp_path / stream / "model.safetensors" for stream in ("--stream", "--no-stream"))
    assert one.read_bytes() == other.read_bytes()
