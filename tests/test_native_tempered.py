"""Files with tempered routers, opened by transformers, against the model as it was converted.

Where a token goes and what comes out are compared end to end, on text that the conversion did not
see.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import native_models
import numerics
import pytest
import torch
import transformers
from native_case import SLICES
from torch import nn

from upcycle import convert
from upcycle.targets.native.fold_router import MOST_ELSEWHERE, MOST_WEIGHT_ERROR

TOKENS = torch.randint(1, 97, (8, 200), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def watched(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [8, 200, 97], and which two experts each layer chose for each token, [L, 1600, 2]."""
    found: list[torch.Tensor] = []
    routers = [m for m in model.modules() if isinstance(getattr(m, "top_k", None), int)]

    def note(_: nn.Module, args: object, output: object) -> None:
        if isinstance(output, tuple) and len(output) == 3:  # logits, weights, index
            found.append(output[2].reshape(-1, 2).sort(-1).values)

    hooks = [router.register_forward_hook(note) for router in routers]
    logits = model(input_ids=TOKENS).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(found)


PAIRS = [
    *(("llama", name) for name in ("mixtral", "qwen2_moe", "ernie4_5_moe", "glm4_moe", "gpt_oss")),
    ("qwen3", "qwen3_moe"),
    ("olmo2", "flex_olmo"),
    ("granite", "granitemoe"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_nearly_all_tokens_go_where_they_went(
    name: str, architecture: str, tmp_path: Path, record_property: Callable[[str, float], None]
) -> None:
    router = {"method": "normal", "top_k": 2, "weights": "one", "std": 0.02}
    recipe = numerics.make_recipe(SLICES, router)
    loose = recipe.verify.model_copy(update={"max_relative_error": 4.0})  # half of the neurons
    recipe = recipe.model_copy(update={"verify": loose})
    dense = copy.deepcopy(native_models.dense_model(name))
    done = convert(dense, recipe, native_models.inputs(name))
    done.save(tmp_path / "out", architecture=architecture)

    files = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits, chosen = watched(files)
    expected, meant = watched(done.model.eval())
    assert chosen.shape == meant.shape == (3, 1600, 2)
    elsewhere = (chosen != meant).any(-1).float().mean().item()
    record_property("elsewhere", elsewhere)
    assert elsewhere < MOST_ELSEWHERE
    # A token that meets other experts gets another output, and those behind it attend to it. For
    # the others the sum of two experts is off by the weights; three layers add up.
    error_BT = (logits - expected).abs().amax(-1) / expected.abs().max()
    assert 1e-6 < error_BT.median() < 3 * MOST_WEIGHT_ERROR
    assert (error_BT < 3 * MOST_WEIGHT_ERROR).float().mean() > 0.5

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    checks = {c["what"]: c["error"] for c in report["checks"]}
    assert 0 < checks["weights of a tempered router"] < MOST_WEIGHT_ERROR
    stated = report["tempered"]
    assert stated["tokens"] == 3 * 48
    share = stated["elsewhere"] / stated["tokens"]
    assert checks["tokens at other experts, by a tempered router"] == share
    seen = native_models.inputs(name)
    with torch.no_grad():
        error = (files(**seen).logits - done.model(**seen).logits).abs().max()
        relative = error / done.model(**seen).logits.abs().max()
    assert stated["outputs"]["logits"]["relative"] == pytest.approx(relative.item(), rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{stated['elsewhere']} of {stated['tokens']} choices fell on other experts" in card
    assert f"relative error {stated['outputs']['logits']['relative']:.2e}" in card
    assert "weights of a tempered router" in card


def test_an_exact_file_says_nothing_of_tempering(tmp_path: Path) -> None:
    router = {"method": "normal", "top_k": "all", "weights": "one", "std": 0.02}
    dense = copy.deepcopy(native_models.dense_model("llama"))
    done = convert(dense, numerics.make_recipe(SLICES, router), native_models.inputs("llama"))
    done.save(tmp_path / "out", architecture="mixtral")
    assert "tempered" not in json.loads((tmp_path / "out" / "report.json").read_text())
    assert "tempered" not in (tmp_path / "out" / "README.md").read_text()
