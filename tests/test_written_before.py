"""Files that version 0.1.0 wrote, before its modules moved, still load and are still read.

`written_before/` has two conversions of random models: a BERT with its own modeling file and a
Llama that became Mixtral; ``expected.safetensors`` is what the converted model computed then.
"""

import ast
from pathlib import Path

import pytest
import torch
from remote_case import without_upcycle
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import upcycle
import upcycle.compiled
import upcycle.kernels.compiled
from upcycle.ir.rounding import ROUNDING
from upcycle.targets.description import read_report

WRITTEN = Path(__file__).parent / "written_before"
FORMS = ("self_contained", "native")
# The same sums, perhaps by another kernel; the derivation is beside the table.
TOLERANCE = ROUNDING[torch.float32]

ALONE = """
expected = load_file(sys.argv[1] + "/expected.safetensors")
model = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
y = floats(model, {"input_ids": expected["input_ids"]})
print(relative(y, expected["output"].double()))
"""


pytestmark = pytest.mark.usefixtures("own_kernels")


def error_of(model: nn.Module, directory: Path) -> float:
    expected = load_file(directory / "expected.safetensors")
    with torch.no_grad():
        y = model(input_ids=expected["input_ids"])[0]
    return float((y - expected["output"]).abs().max() / expected["output"].abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_upcycle_loads_it(form: str) -> None:
    assert error_of(upcycle.load(WRITTEN / form), WRITTEN / form) <= TOLERANCE


def test_the_auto_classes_load_it() -> None:
    directory = WRITTEN / "self_contained"
    assert error_of(AutoModel.from_pretrained(directory).eval(), directory) <= TOLERANCE
    directory = WRITTEN / "native"
    assert error_of(AutoModelForCausalLM.from_pretrained(directory).eval(), directory) <= TOLERANCE


def test_another_weight_gives_another_output() -> None:
    model = upcycle.load(WRITTEN / "self_contained")
    with torch.no_grad():
        model.get_parameter("encoder.layer.1.output.dense.experts.down_proj").mul_(1.01)
    assert error_of(model, WRITTEN / "self_contained") > TOLERANCE


def test_its_own_file_runs_without_upcycle() -> None:
    assert without_upcycle(ALONE, WRITTEN / "self_contained") <= TOLERANCE


@pytest.mark.parametrize(
    ("form", "recipe"), [(FORMS[0], "moefication"), (FORMS[1], "sparse-upcycling")]
)
def test_its_report_is_read(form: str, recipe: str) -> None:
    report = read_report(WRITTEN / form)
    assert report.recipe == recipe
    assert all(check.passed for check in report.checks)


def test_the_kernels_are_where_its_own_file_looks_for_them() -> None:
    """It falls back to slow kernels, and says nothing, where the import fails."""
    source = (WRITTEN / "self_contained" / "modeling_upcycle.py").read_text("utf-8")
    found = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("upcycle")
        for alias in node.names
    ]
    assert found == [("upcycle.compiled", "run_compiled"), ("upcycle.compiled", "run_routed")]
    for _, name in found:
        assert getattr(upcycle.compiled, name) is getattr(upcycle.kernels.compiled, name)
