"""A converted ONNX file beside the file that it was made from."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from command_line import run
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file with two FFNs, and its conversion."""
    folder = tmp_path_factory.mktemp("files")
    dense, out = folder / "mlp.onnx", folder / "moe"
    layers = [nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)] * 2
    model = nn.Sequential(*layers).eval()
    shapes = ({0: "batch"},)
    torch.onnx.export(model, (torch.randn(4, 16),), dense, dynamic_shapes=shapes, verbose=False)
    loose = ("--set", "verify.max_relative_error=10")
    small = ("--set", "experts.count=8", "--set", "router.top_k=2")
    run("convert", dense, "--recipe", "moefication", *small, *loose, "--out", out, "-q")
    return dense, out


def test_both_files_are_timed(files: tuple[Path, Path]) -> None:
    dense, out = files
    quick = ("--against", dense, "--seconds", "0", "--tokens", "1,8")
    found = json.loads(run("bench", out, *quick, "--json").stdout)
    assert [row["tokens"] for row in found["reading"]] == [None, 1, 8]
    for row in found["reading"]:
        assert row["ratio"]["median"] > 0
    assert found["engine"] == "onnx"
    assert found["costs"]["flops_after"] < found["costs"]["flops_before"]
    table = run("bench", out, *quick).stdout
    assert "8 examples" in table
    assert "not measured" in table


def test_a_directory_without_a_file_is_one_sentence(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, out = files
    other = shutil.copytree(out, tmp_path / "other")
    (other / "model.onnx").unlink()
    refused = run("bench", other, "--against", dense, code=2)
    assert refused.stderr == f"error: {other}: no model.onnx is here\n"


def test_the_file_of_a_conversion_is_inspected_as_its_directory(files: tuple[Path, Path]) -> None:
    _, out = files
    assert run("inspect", out / "model.onnx").stdout == run("inspect", out).stdout
    assert onnxruntime.InferenceSession(out / "model.onnx").get_inputs()
