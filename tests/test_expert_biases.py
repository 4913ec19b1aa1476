"""Experts that are whole FFNs have an output bias each; parts of one FFN have it in common."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numerics
import pytest
import small_models
import torch
import transformers
from torch import nn

import upcycle
from upcycle.conversion.verify_directory import verify_directory
from upcycle.layers.config import LayerConfig
from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE
from upcycle.models.named import open_model
from upcycle.onnx.run import run
from upcycle.passes.experts.method import ExpertMethod
from upcycle.recipe.schema import Recipe
from upcycle.verification.metrics import distance

# Two layers of sums of at most 64 products, each off by a rounding; some are amplified.
BOUND = 1e-6
IDS = torch.arange(24).reshape(2, 12)
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
SOUND = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))


def clip() -> Any:
    config = transformers.CLIPConfig(
        text_config={**small_models.ENCODER, "vocab_size": 300, "eos_token_id": 299},
        vision_config={**small_models.ENCODER, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


MODELS: dict[str, Mapping[str, torch.Tensor]] = {
    "bert": {"input_ids": IDS},
    "vit": {"pixel_values": PICTURES},
    "clip": {"input_ids": IDS, "pixel_values": PICTURES},
    "gpt2": {"input_ids": IDS},
    "whisper": {"input_features": SOUND, "decoder_input_ids": IDS},
}
# Linear maps, and transposed ones; the layers of the others are no different in a graph.
WITH_ONNX = {"vit", "gpt2"}


def drawn(name: str, seed: int) -> Any:
    """A model whose biases are as large as its weights."""
    torch.manual_seed(seed)
    model = (clip if name == "clip" else small_models.BUILD[name])().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def recipe(count: int, **more: Any) -> Recipe:
    experts: dict[str, Any] = {"method": "from_checkpoints", "count": count, "merge": 1}
    router = {"method": "normal", "top_k": 1, "weights": "softmax", "std": 0.0, "bias": True}
    budget: dict[str, Any] = {"max_relative_error": 99.0}
    onnx = {"cache": False}
    return numerics.make_recipe({**experts, **more}, router, verify=budget, onnx=onnx)


def layers_of(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def force(model: nn.Module, expert: int) -> None:
    """Let every token visit one expert, with weight one."""
    for layer in layers_of(model):
        layer.router.bias.data = torch.full_like(layer.router.bias, -1e4)
        layer.router.bias.data[expert] = 0.0


def output(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return (found.logits_per_image if "logits_per_image" in found else found.logits).clone()


@pytest.mark.parametrize("name", MODELS)
def test_forced_to_an_expert_the_files_are_its_source(name: str, tmp_path: Path) -> None:
    models, batch = [drawn(name, seed) for seed in range(3)], MODELS[name]
    done = upcycle.convert(models[0], recipe(3), sources=models, example_inputs=dict(batch))
    assert all(row.untraced_rows == 0 for row in done.report.layers)
    force(done.model, 1)
    expected = output(models[1], batch)
    assert distance(output(done.model, batch), expected).relative < BOUND
    targets = ["safetensors", "onnx"] if name in WITH_ONNX else ["safetensors"]
    done.save(tmp_path / "out", targets=targets)
    loaded = upcycle.load(tmp_path / "out")
    assert distance(output(loaded, batch), expected).relative < BOUND
    if name in WITH_ONNX:
        file = tmp_path / "out" / "model.onnx"
        values = run(file, {key: value.numpy() for key, value in batch.items()})
        assert distance(torch.from_numpy(values["logits"]), expected).relative < BOUND
    force(loaded, 0)  # its biases are others: everything that is not an expert is the source 1
    for layer in layers_of(loaded):
        layer.experts.down_proj_bias.data[0] = layer.experts.down_proj_bias[1]
    wrong = output(loaded, batch)
    force(loaded, 1)
    assert distance(wrong, output(loaded, batch)).relative > 1e-3


@pytest.mark.parametrize("up_bias", [True, False])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_every_way_to_run_experts_adds_their_biases(name: str, up_bias: bool) -> None:
    ffns = [numerics.random_ffn(name, seed=seed, dtype=torch.float32) for seed in range(3)]
    experts = Experts(
        3, 16, 48, 16, pointwise=ffns[0].pointwise, bias=up_bias, down_bias=True
    ).requires_grad_(False)
    expected = []
    x_TD = numerics.random_tokens(9, 16, torch.float32)
    for e, ffn in enumerate(ffns):
        experts.up_EGD[e] = ffn.up_MFD.flatten(0, 1)[: len(experts.up_EGD[e])]
        experts.down_proj[e] = ffn.down_OF
        experts.down_proj_bias[e] = torch.full((16,), e + 1.0)
        y_TO = experts.act_fn(*(x_TD @ experts.up_EGD[e].T).chunk(ffn.pointwise.arity, -1))
        expected.append(y_TO @ ffn.down_OF.T + (e + 1.0))
    index_TK, weights_TK = torch.tensor([[0, 1], [2, 0], [1, 2]] * 3), torch.rand(9, 2)
    weights_TK[0, 1] = 0
    stacked = torch.stack(expected, 1)
    want = (stacked.gather(1, index_TK[..., None].expand(-1, -1, 16)) * weights_TK[..., None]).sum(
        1
    )
    bound = 64 * torch.finfo(torch.float32).eps * stacked.abs().max()
    ways = ["upcycle", "eager", "grouped_mm", "batched_mm"]
    for way in ways:
        experts.config._experts_implementation = way
        assert (experts(x_TD, index_TK, weights_TK) - want).abs().max() < bound, way
    experts.config._experts_implementation = "upcycle"
    assert (experts.masked_forward(x_TD, index_TK, weights_TK) - want).abs().max() < bound
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    assert (compiled(x_TD, index_TK, weights_TK) - want).abs().max() < bound
    experts.down_proj_bias[1] += 0.5
    assert (experts(x_TD, index_TK, weights_TK) - want).abs().max() > 0.1


WHOLE: list[tuple[dict[str, Any], float | None]] = [
    ({"method": "copy", "count": 4}, None),
    ({"method": "copy", "count": 5, "shared": 1}, 0.5),
    ({"method": "noise", "count": 4}, None),
    ({"method": "zero_routed", "count": 4}, 1.0),
]


@pytest.mark.parametrize(("experts", "hoisted"), WHOLE)
def test_whole_ffns_have_biases_that_train_apart(
    experts: dict[str, Any], hoisted: float | None
) -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    assert ffn.down_bias_O is not None
    router = {"method": "normal", "top_k": 2, "weights": "renormalised", "std": 1.0}
    spec, weights, layer = numerics.convert(ffn, numerics.make_recipe(experts, router))
    bias_EO = layer.experts.down_bias_EO
    assert bias_EO is not None
    factor = {None: 1.0, 0.5: 0.5, 1.0: 0.0}[hoisted]
    assert torch.equal(bias_EO, factor * ffn.down_bias_O.expand(4, -1))
    if hoisted is None:
        assert weights.output_bias_O is None
        assert layer.output_bias is None
    else:
        assert torch.equal(layer.output_bias, hoisted * ffn.down_bias_O)
    layer.train()
    layer(numerics.random_tokens(64, ffn.up_MFD.shape[-1], torch.float32)).square().sum().backward()
    grad_EO = layer.experts.down_proj_bias.grad
    assert grad_EO is not None
    assert len(grad_EO.unique(dim=0)) == 4
    assert LayerConfig.from_json(spec.layer_config().to_json()) == spec.layer_config()


@pytest.mark.parametrize("method", ["contiguous", "granular"])
def test_parts_of_an_ffn_have_one_in_common(method: str) -> None:
    ffn = numerics.random_ffn("gelu", dtype=torch.float32)
    made = numerics.make_recipe(
        {"method": method, "count": 4}, {"method": "zero", "top_k": 2, "weights": "one"}
    )
    spec, _, layer = numerics.convert(ffn, made)
    assert layer.experts.down_bias_EO is None
    assert torch.equal(layer.output_bias, ffn.down_bias_O)
    assert "expert_bias" not in spec.layer_config().to_json()


def test_a_bias_that_is_not_its_sources_is_traced() -> None:
    models = [drawn("bert", seed) for seed in range(2)]
    done = upcycle.convert(models[0], recipe(2), sources=models)
    with torch.no_grad():
        layers_of(done.model)[1].experts.down_proj_bias[1, 3] += 0.25
    again = done.opened.verify_module(done.measured, done.made)
    assert [row.untraced_rows for row in again.layers or ()] == [0, 1]


def test_a_directory_from_before_is_loaded_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There all experts had one output bias in common."""
    dense = small_models.saved("bert", tmp_path / "dense")
    with monkeypatch.context() as earlier:
        earlier.setattr(ExpertMethod, "makes_whole_ffns", False)
        done = upcycle.convert(upcycle.load(dense), "sparse-upcycling")
        done.save(tmp_path / "old", targets=["safetensors"])
    text = (tmp_path / "old" / "config.json").read_text("utf-8")
    assert '"output_bias": true' in text
    assert "expert_bias" not in text
    loaded = upcycle.load(tmp_path / "old")
    assert all(layer.experts.down_bias_EO is None for layer in layers_of(loaded))
    batch = MODELS["bert"]
    assert distance(output(loaded, batch), output(upcycle.load(dense), batch)).relative < BOUND
    found = verify_directory(open_model(str(dense)), tmp_path / "old")
    assert all(check.passed for check in found.checks)
    assert all(row.untraced_rows == 0 for row in found.layers or ())
