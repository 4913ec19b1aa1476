"""Every architecture that has no native MoE twin, through its own code and without upcycle.

Each is converted with copies and with a split, written, and opened in another process in which
``import upcycle`` fails.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import remote_models
import torch
from remote_case import without_upcycle
from safetensors.torch import save_file

from upcycle.conversion.api import convert
from upcycle.data.verification_inputs import evaluation_for
from upcycle.targets.remote_code import auto_classes

# A sum of n products errs by at most n eps of its largest term. Each of at most 4 layers sums 32
# products four times for attention, 32 and 64 for the FFN, and the head 32. Roundings partly cancel
# (up to 9 were seen); a wrong expert makes over 1e4.
ULPS = 4 * (4 * 32 + 32 + 64) + 32
EPS = torch.finfo(torch.float32).eps

RECIPES = ("sparse-upcycling", "split-all")
CASES = [f"{name}.{recipe}" for name in remote_models.MODELS for recipe in RECIPES]
GENERATING = [case for case in CASES if remote_models.MODELS[case.split(".")[0]][2]]

ELSEWHERE = """
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    about = json.loads((folder / "about.json").read_text())
    auto = getattr(transformers, about["auto"])
    example = load_file(folder / "example.safetensors")
    expected, text = example.pop("expected"), example.pop("generated", None)
    result = found[folder.name] = {}
    model = auto.from_pretrained(folder / "moe", trust_remote_code=True).eval()
    result["class"] = type(model).__name__
    result["error"] = relative(floats(model, example), expected)
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        result[name] = relative(floats(model, example), expected)
    model.set_experts_implementation("grouped_mm")
    if text is not None:
        given = {k: v[:1] for k, v in example.items() if not k.startswith("decoder")}
        again = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        result["same text"] = torch.equal(again, text)
    model.save_pretrained(folder / "again")
    again = auto.from_pretrained(folder / "again", trust_remote_code=True).eval()
    result["saved again"] = relative(floats(again, example), expected)
    names = [n for n, p in model.named_parameters() if ".experts." in n]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing and model.supports_gradient_checkpointing:
            model.train()  # checkpoints are made in training only
            model.gradient_checkpointing_enable()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                for key in ("dropout", "output_dropout", "dropout_prob", "attention_dropout"):
                    if isinstance(getattr(module, key, None), float):
                        setattr(module, key, 0.0)
        model.zero_grad()
        out = model(**example)
        (out.logits if "logits" in out else out[0]).float().pow(2).mean().backward()
        gradients.append(torch.cat([model.get_parameter(n).grad.flatten() for n in names]))
    result["gradients"] = relative(gradients[1].double(), gradients[0].double())
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    result["trained"] = sum(not torch.equal(before[n], model.get_parameter(n)) for n in names)
    result["trainable"] = len(names)
print(json.dumps(found))
"""


def write(case: str, folder: Path) -> None:
    """The converted model in `folder`, and what the dense model makes of an example."""
    name, recipe = case.split(".")
    dense = remote_models.build(name)
    inputs: Any = evaluation_for(dense).batches[0]
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        out = dense(**tensors)
        expected = (out.logits if "logits" in out else out[0]).double()
        if case in GENERATING:
            given = {k: v[:1] for k, v in tensors.items() if not k.startswith("decoder")}
            limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            tensors["generated"] = dense.generate(**given, **limits)
    tensors["expected"] = expected
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "example.safetensors")
    (folder / "about.json").write_text(json.dumps({"auto": auto_classes(dense)[0]}))
    convert(dense, recipe, verify=False).save(folder / "moe", verify=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the other process found, by case."""
    folder = tmp_path_factory.mktemp("models")
    for case in CASES:
        write(case, folder / case)
        form = json.loads((folder / case / "moe" / "config.json").read_text())["model_type"]
        assert form.startswith("upcycle_"), f"{case}: {form}"
    results: dict[str, dict[str, Any]] = without_upcycle(ELSEWHERE, folder)
    return results


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_dense_model_does(case: str, found: dict[str, Any]) -> None:
    name = remote_models.MODELS[case.split(".")[0]][0]
    assert found[case]["class"] == f"Upcycle{name}"
    for way in ("error", "eager", "batched_mm", "saved again"):
        assert found[case][way] <= ULPS * EPS, way


@pytest.mark.parametrize("case", GENERATING)
def test_it_generates_the_same_text(case: str, found: dict[str, Any]) -> None:
    assert found[case]["same text"]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_with_gradient_checkpointing(case: str, found: dict[str, Any]) -> None:
    """The gradients are those without it; twice the roundings, and those of the backward pass."""
    assert found[case]["gradients"] <= 4 * ULPS * EPS
    assert found[case]["trained"] == found[case]["trainable"] > 0
