"""Each layout of a native checkpoint, from the command line: in memory, and layer by layer.

A streamed conversion verifies every layer as it is read back from the file, so the two say that
what was written can be read, and the bytes that it is the same.
"""

import json
from pathlib import Path

import native_models
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from upcycle.cli.main import main

SPLIT = ("experts.count=4", "router.top_k=2", "verify.max_relative_error=5.0")
CASES = {
    "mixtral": SPLIT,
    "qwen2_moe": (*SPLIT, "experts.shared=1"),
    "granitemoeshared": (*SPLIT, "experts.shared=1"),
    "ernie4_5_moe": (*SPLIT, "experts.shared=1"),
    "glm4_moe": (*SPLIT, "experts.shared=1", "router.bias=true"),
    "gpt_oss": (*SPLIT, "router.bias=true"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    native_models.dense_model("llama").save_pretrained(folder)
    return folder


def convert(model: Path, out: Path, *options: str) -> Result:
    arguments = ["convert", str(model), "--recipe", "moefication", "--out", str(out)]
    return CliRunner().invoke(main, [*arguments, "--target", "safetensors", *options])


@pytest.mark.parametrize("architecture", CASES)
def test_streamed_bytes_are_those_of_a_conversion_in_memory(
    architecture: str, llama: Path, tmp_path: Path
) -> None:
    options = ["--architecture", architecture]
    for change in CASES[architecture]:
        options += ["--set", change]
    for how in ("--stream", "--no-stream"):
        result = convert(llama, tmp_path / how, *options, how)
        assert result.exit_code == 0, result.output
    whole, pieces = ((tmp_path / how / "model.safetensors") for how in ("--no-stream", "--stream"))
    assert whole.read_bytes() == pieces.read_bytes()
    assert json.loads((whole.parent / "config.json").read_text())["model_type"] == architecture


def test_one_wrong_expert_in_the_files_is_found(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of tempered files is to rounding, whatever tempering itself changes."""
    import upcycle.verification.files

    def damaged(directory: Path, **options: object) -> object:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"] *= 1.001
        save_file(tensors, path, metadata={"format": "pt"})
        return load(directory, **options)

    load = upcycle.verification.files.load
    monkeypatch.setattr(upcycle.verification.files, "load", damaged)
    options = [part for change in SPLIT for part in ("--set", change)]
    result = convert(llama, tmp_path / "out", "--architecture", "mixtral", *options)
    assert result.exit_code == 3
    assert "files loaded again" in result.output
