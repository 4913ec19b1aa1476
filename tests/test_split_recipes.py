"""Every recipe that splits FFNs by what data shows, from conversion to files."""

from pathlib import Path

import pytest
import small_models
import torch
import transformers

import upcycle
from upcycle.data import default_data
from upcycle.errors import UsageError
from upcycle.models.named import open_model

PROMISES = {
    "cmoe": "exact with all experts",
    "expertweaver": "exact with all experts",
    "llama-moe": "approximate",
    "moebert": "approximate",
}
SMALL = ["calibration.tokens=4096", "calibration.length=64", "verify.max_relative_error=10.0"]


@pytest.mark.parametrize("name", PROMISES)
def test_a_recipe_becomes_files_that_compute_the_same(name: str, tmp_path: Path) -> None:
    size = {"num_hidden_layers": 2 if name == "expertweaver" else 1}  # it looks at all layers
    dense = small_models.saved("llama", tmp_path / "dense", with_tokenizer=True, **size)
    source = open_model(str(dense))
    text = default_data.default_text()[:60_000]
    done = upcycle.convert(source.load(), name, calibration=text, source=source, overrides=SMALL)
    assert done.plan.promise == PROMISES[name]
    assert done.report.end_to_end.relative > 1e-3
    done.save(tmp_path / name, targets=["safetensors", "onnx"])  # tiers T3 and T4
    assert all(check.passed for check in done.report.checks)
    loaded = upcycle.load(tmp_path / name)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / name, trust_remote_code=True
    )
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = done.model(input_ids=tokens).logits
        for other in (loaded, again.eval()):
            found = other(input_ids=tokens).logits
            # One or two layers of sums of at most 128 products, in another order.
            bound = 300 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (found - expected).abs().max() < bound


def test_layers_of_different_widths_are_merged_back_bit_for_bit(tmp_path: Path) -> None:
    source = open_model(str(small_models.saved("llama", tmp_path / "dense", with_tokenizer=True)))
    dense = source.load()
    text = default_data.default_text()[:60_000]
    done = upcycle.convert(dense, "expertweaver", calibration=text, source=source, overrides=SMALL)
    shared = [spec.shared for spec in done.plan.specs]
    assert sum(shared) == 2 * 64 // 4
    merged = done.to_dense().state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(merged[name], tensor), name
    fixed = upcycle.convert(
        dense,
        "expertweaver",
        calibration=text,
        source=source,
        overrides=[*SMALL, "experts.adaptive=false"],
    )
    assert [spec.shared for spec in fixed.plan.specs] == [16, 16]


def test_domains_need_texts() -> None:
    model = small_models.build("llama")
    with pytest.raises(UsageError, match="16 routed experts and 1 domain;") as caught:
        upcycle.convert(model, "llama-moe", overrides=SMALL)
    assert "\n" not in str(caught.value)
