"""Whole models as ONNX files whose weights stay in the safetensors file."""

import logging
from pathlib import Path

import onnx
import pytest
import small_models
import torch
from onnx_case import moe, save, stored_in
from onnx_compare import compare_with_torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import upcycle
from upcycle.errors import UnsupportedError, UsageError
from upcycle.layers.tap import Tap, TappedMoE
from upcycle.onnx.run import session
from upcycle.recipe.onnx import Onnx
from upcycle.targets.files.stored import Stored
from upcycle.targets.onnx.export import export_onnx

# Two float32 evaluations of one model: each layer mixes sums of at most 64 products and divides by
# a standard deviation of about one; 4 blocks of such layers. A wrong expert is off by 1e-1.
TOLERANCE = 256 * torch.finfo(torch.float32).eps


def bert(activation: str = "gelu") -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    model = BertModel(config).eval()
    for i, block in enumerate(model.encoder.layer):
        block.intermediate = moe(activation, ("softmax", "one")[i], d_model=32, width=64, seed=i)
        block.output.dense = nn.Identity()
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for i, block in enumerate(model.model.layers):
        block.mlp = moe("swiglu", bias=False, d_model=32, width=48, seed=i)
    return model


def tokens(batch: int, length: int, *, padding: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length - padding :] = 0
    return {
        "input_ids": torch.randint(0, 99, (batch, length), generator=generator),
        "attention_mask": mask,
    }


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Both, for tests that leave them as they are; with `one_trace` each is traced once."""
    return {"bert": bert(), "llama": llama()}


SIZES = [tokens(1, 1), tokens(3, 7), tokens(2, 30), tokens(4, 9, padding=4)]


def export(model: nn.Module, folder: Path, stored: dict[str, Stored], **options) -> Path:
    path = export_onnx(model, tokens(2, 5), path=folder / "model.onnx", stored=stored, **options)
    assert not (folder / "model.onnx.data").exists()
    return path


def assert_same(path: Path, model: nn.Module) -> None:
    for difference in compare_with_torch(path, model, SIZES):
        assert difference.max_reference > 0.1
        assert difference.max_abs_error <= TOLERANCE * difference.max_reference


def external(path: Path) -> dict[str, dict[str, str]]:
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    return {i.name: {e.key: e.value for e in i.external_data} for i in initializers}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_model(tmp_path, name, models, one_trace) -> None:
    model = models[name]
    stored = save(model, tmp_path)
    path = export(model, tmp_path, stored)
    assert_same(path, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]
    assert path.stat().st_size < 120_000

    graph = onnx.load(path, load_external_data=False).graph
    floats = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    for i in floats:
        assert i.external_data or len(i.raw_data) < 1024, i.name
    experts = [i.name for i in floats if "experts" in i.name and "bias" not in i.name]
    assert len(experts) == 4
    assert all(name in stored for name in experts)
    onnx.checker.check_model(path, full_check=True)


def test_names_and_axes(tmp_path, models, one_trace) -> None:
    model = models["bert"]
    path = export(model, tmp_path, save(model, tmp_path))
    file = onnx.load(path, load_external_data=False)
    assert [i.name for i in file.graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in file.graph.output] == ["last_hidden_state", "pooler_output"]
    axes = [d.dim_param or d.dim_value for d in file.graph.output[0].type.tensor_type.shape.dim]
    assert axes == ["batch", "sequence", 32]
    assert [n.name for n in file.graph.node if n.op_type.startswith("MoE")] == [
        "encoder/layer/0/intermediate/MoE",
        "encoder/layer/1/intermediate/MoE",
    ]
    assert b"/site-packages/" not in path.read_bytes()


def test_tapped_layer(tmp_path) -> None:
    """The layer that computes in the place of a contraction, on what another module was given."""
    torch.manual_seed(0)
    layer = moe("relu", d_model=16, width=32)
    tapped = TappedMoE(layer.config)
    tapped.load_state_dict(layer.state_dict())
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model.linear1, model.linear2 = Tap(tapped, first=True, width=0), tapped.eval()
    x = torch.randn(2, 5, 16)
    path = export_onnx(
        model,
        (x,),
        path=tmp_path / "model.onnx",
        stored=save(model, tmp_path),
    )
    assert not (tmp_path / "model.onnx.data").exists()
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert any(node.op_type.startswith("MoE") for node in nodes)
    found = compare_with_torch(path, model, [(x,), (torch.randn(3, 2, 16),)])
    assert all(d.max_abs_error <= TOLERANCE * d.max_reference for d in found)


def test_inputs_in_order(tmp_path, models, one_trace) -> None:
    model = models["bert"]
    path = export_onnx(
        model,
        tuple(tokens(2, 5).values()),
        path=tmp_path / "model.onnx",
        stored=save(model, tmp_path),
    )
    assert [i.name for i in session(path).get_inputs()] == ["input_ids", "attention_mask"]
    assert [o.name for o in session(path).get_outputs()] == ["last_hidden_state", "pooler_output"]
    for given in (SIZES[1], tuple(SIZES[1].values())):
        (difference,) = compare_with_torch(path, model, [given])
        assert difference.max_abs_error <= TOLERANCE * difference.max_reference


@pytest.mark.parametrize("form", ["fused", "unrolled"])
def test_experts_one_by_one_on_disk(tmp_path, form, models, one_trace) -> None:
    """Mixtral's layout: a 2-D tensor for each expert and matrix, those of a kind in a row."""
    model = models["llama"]
    tensors = {
        k: v for k, v in model.state_dict().items() if ".experts." not in k and "lm_head" not in k
    }
    kinds = {}
    for i, block in enumerate(model.model.layers):
        gate, up = block.mlp.experts.gate_up_proj.detach().chunk(2, dim=1)
        for kind, stack in (("w1", gate), ("w3", up), ("w2", block.mlp.experts.down_proj.detach())):
            for e, expert in enumerate(stack):  # "w1.0" and not "0.w1": the writer sorts by name
                tensors[f"model.layers.{i}.block_sparse_moe.experts.{kind}.{e}"] = (
                    expert.contiguous()
                )
            kinds[f"model.layers.{i}.block_sparse_moe.experts.*.{kind}"] = len(stack)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    stored = stored_in(file)
    for name, count in kinds.items():
        parts = [stored[f"{name.replace('*.', '')}.{e}"] for e in range(count)]
        assert parts[-1].offset == parts[0].offset + 4 * 48 * 32 * (count - 1)
        stack = (count, *parts[0].shape)
        stored[name] = Stored(file.name, parts[0].offset, stack, torch.float32)
    path = export(model, tmp_path, stored, options=Onnx(form=form))
    assert set(kinds) <= set(external(path))
    nodes = onnx.load(path, load_external_data=False).graph.node
    domain = {"fused": "com.microsoft", "unrolled": "upcycle"}[form]
    assert {n.domain for n in nodes if n.op_type.startswith("MoE")} == {domain}
    assert_same(path, model)


def test_narrow_weights_on_disk(tmp_path) -> None:
    """The file holds bfloat16, the graph computes in float32."""
    model = llama().bfloat16()
    stored = save(model, tmp_path)
    model = model.float()
    path = export(model, tmp_path, stored)
    types = {i.data_type for i in onnx.load(path, load_external_data=False).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types
    assert_same(path, model)


def test_what_is_not_on_disk(tmp_path, caplog, models, one_trace) -> None:
    model = models["bert"]
    stored = save(model, tmp_path)
    del stored["encoder.layer.0.intermediate.experts.down_proj"]
    path = tmp_path / "model.onnx"
    with caplog.at_level(logging.WARNING, logger="upcycle"):
        export_onnx(model, tokens(2, 5), path=path, stored=stored)
    assert "1 tensors" in caplog.text
    assert (tmp_path / "model.onnx.data").stat().st_size == 5 * 32 * 64 * 4
    assert_same(path, model)

    # Two experts of the file change places: with copies nobody would notice.
    entry = stored["encoder.layer.1.intermediate.experts.down_proj"]
    data = bytearray((tmp_path / entry.file).read_bytes())
    size = 32 * 64 * 4
    first = slice(entry.offset, entry.offset + size)
    second = slice(entry.offset + size, entry.offset + 2 * size)
    data[first], data[second] = data[second], data[first]
    (tmp_path / entry.file).write_bytes(data)
    with pytest.raises(AssertionError):
        assert_same(path, model)


def test_axis_that_cannot_vary(tmp_path, caplog) -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[1] == 3 else x * 3

    options = {"path": tmp_path / "model.onnx", "stored": {}}
    model, x = Picky(), torch.ones(2, 3, 4)
    with pytest.raises(UnsupportedError, match=r"axis 1 \(columns\) of input x can only be 3"):
        export_onnx(model, (x,), dynamic={"x": {0: "rows", 1: "columns"}}, **options)
    path = export_onnx(model, (x,), dynamic={"x": {0: "rows"}}, **options)
    assert [i.shape for i in session(path).get_inputs()] == [["rows", 3, 4]]
    with caplog.at_level(logging.WARNING, logger="upcycle"):
        export_onnx(model, (x,), **options)
    assert "axis 1 (sequence) of input x can only be 3" in caplog.text
    assert [i.shape for i in session(path).get_inputs()] == [["batch", 3, 4]]


def test_without_onnx_runtime(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="pip install onnxruntime"):
        session(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("recipe", "architecture"), [("split-all", "mixtral"), ("sepit", "qwen2_moe")]
)
def test_weights_that_a_native_file_holds_scaled_are_not_written_again(
    recipe: str, architecture: str, tmp_path: Path
) -> None:
    dense = small_models.build("llama", num_hidden_layers=1)
    done = upcycle.convert(dense, recipe, overrides=["experts.count=4"])
    before = {key: tensor.clone() for key, tensor in done.model.state_dict().items()}
    done.save(tmp_path / "moe", targets=["safetensors", "onnx"])
    assert done.report.checkpoint.architecture == architecture
    assert (tmp_path / "moe" / "model.onnx").is_file()
    assert not (tmp_path / "moe" / "model.onnx.data").exists()
    assert all(torch.equal(before[key], value) for key, value in done.model.state_dict().items())
