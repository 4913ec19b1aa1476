"""ONNX files beside native checkpoints: every weight of the layers is read from the checkpoint."""

import copy
import shutil
from pathlib import Path

import native_models
import onnx
import pytest
import torch
from transformers import LlamaForCausalLM

import upcycle
from upcycle.targets.onnx.decode import OnnxFiles

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-5  # of the largest logit
SHARED, ALL = "experts.shared=1", "router.top_k=all"
CASES = {
    # twice the shared expert, in two matrices and padded with zeros
    "qwen2_moe": (SHARED, ALL),
    "qwen2_moe tempered": (SHARED, "router.top_k=2"),
    "granitemoeshared": (SHARED, ALL),
    "glm4_moe": (SHARED, "router.top_k=1"),  # a router divided by 16
    # experts transposed, with alternating rows
    "gpt_oss": ("router.weights=renormalised", "router.top_k=2"),
}


def dense() -> LlamaForCausalLM:
    """One layer whose router and shared expert are too large to be kept in the graph."""
    config = copy.deepcopy(native_models.dense_model("llama").config)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 16
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def held(file: onnx.ModelProto) -> list[onnx.TensorProto]:
    return list(file.graph.initializer)


def data_files(path: Path) -> set[str]:
    """The files that hold what the ONNX file does not."""
    file = onnx.load(path, load_external_data=False)
    return {entry.value for t in held(file) for entry in t.external_data if entry.key == "location"}


def written(case: str, folder: Path) -> torch.nn.Module:
    base = ["experts.count=4", "experts.method=contiguous", "router.method=normal"]
    done = upcycle.convert(
        dense(), "moefication", overrides=[*base, "verify.max_relative_error=50.0", *CASES[case]]
    )
    architecture = case.split()[0]
    targets = ["safetensors", "onnx"]
    done.save(folder, targets=targets, architecture=architecture, verify=False)
    assert done.report.checkpoint.architecture == architecture
    return done.model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("qwen") / "moe"
    return written("qwen2_moe", folder), folder


@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_written_again(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if case == "qwen2_moe":
        model, folder = request.getfixturevalue("qwen")
    else:
        model, folder = written(case, tmp_path / "moe"), tmp_path / "moe"
    assert data_files(folder / "model.onnx") == {"model.safetensors"}
    assert not (folder / "model.onnx.data").exists()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (folder / "model.onnx").stat().st_size < size / 4
    given = native_models.inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
    made = torch.from_numpy(OnnxFiles(folder).outputs(given)["logits"])
    assert (made - expected).abs().max() <= CLOSE * expected.abs().max()


def test_a_shared_expert_that_is_not_halved_is_noticed(
    qwen: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    model, folder = qwen[0], shutil.copytree(qwen[1], tmp_path / "moe")
    path = folder / "model.onnx"
    file = onnx.load(path, load_external_data=False)
    scalars = {t.name: float(onnx.numpy_helper.to_array(t)) for t in held(file) if not t.dims}
    (halved,) = [
        node
        for node in file.graph.node
        if node.op_type == "Mul" and "shared_expert" in node.name and node.input[1] in scalars
    ]
    assert scalars[halved.input[1]] == 0.5
    halved.op_type = "Identity"
    del halved.input[1]
    onnx.save(file, path)
    given = native_models.inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
    made = torch.from_numpy(OnnxFiles(folder).outputs(given)["logits"])
    assert (made - expected).abs().max() > 100 * CLOSE * expected.abs().max()
