"""Experts from several models: what each layer holds, what the rest is, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numerics
import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import upcycle
from upcycle.cli.main import main
from upcycle.recipe.schema import Recipe

TOKENS = torch.arange(24).reshape(2, 12)


def family(count: int, name: str = "llama") -> list[Any]:
    return [small_models.build(name, seed) for seed in range(count)]


def recipe(count: int, top_k: int = 2, **experts: object) -> Recipe:
    return numerics.make_recipe(
        {"method": "from_checkpoints", "count": count, **experts},
        {"method": "normal", "top_k": top_k, "weights": "renormalised", "std": 0.2},
        verify={"max_relative_error": 9.0},
    )


def layers_of(model: nn.Module) -> list[upcycle.MoE]:
    return [m for m in model.modules() if isinstance(m, upcycle.MoE)]


def force(model: nn.Module, expert: int) -> None:
    """Make every router choose one expert."""
    for layer in layers_of(model):
        layer.router.bias = nn.Parameter(torch.zeros(layer.router.num_experts))
        with torch.no_grad():
            layer.router.bias[expert] = 1e4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=TOKENS).logits
    return out


def generated(model: Any) -> list[int]:
    tokens = model.generate(
        TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return list(map(int, tokens[0]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_sources_are_the_dense_model(name: str) -> None:
    model = small_models.build(name)
    others = [small_models.build(name), small_models.build(name)]
    done = upcycle.convert(model, recipe(3), sources=[model, *others])
    assert done.report.end_to_end.relative < 1e-6
    different = upcycle.convert(model, recipe(3), sources=[model, *family(3, name)[1:]])
    assert different.report.end_to_end.relative > 1e-2


@pytest.mark.parametrize("merge", ["mean", "first", 2])
def test_the_rest_is_merged(merge: str | int) -> None:
    models = family(3)
    done = upcycle.convert(models[0], recipe(3, merge=merge), sources=models)
    dense = [model.state_dict() for model in models]
    chosen = dense if merge == "mean" else [dense[0 if merge == "first" else 2]]
    compared = 0
    for name, tensor in done.model.state_dict().items():
        if name in dense[0]:
            expected = sum(state[name].double() for state in chosen) / len(chosen)
            assert torch.equal(tensor, expected.to(tensor.dtype)), name
            compared += 1
    assert compared == len(dense[0]) - 2 * 3  # all but gate, up and down of two layers
    assert models[0].state_dict().keys() == dense[0].keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("source", [0, 2])
def test_forced_to_one_expert_the_model_is_that_source(name: str, source: int) -> None:
    models = family(3, name)
    for i, model in enumerate(models):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    done = upcycle.convert(models[1], recipe(3, merge=source), sources=models)
    force(done.model, source)
    found, expected = logits(done.model), logits(models[source])
    # Two layers of sums of at most 128 products, and the logits of 32, each off by a rounding.
    bound = 300 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (found - expected).abs().max() < bound
    assert generated(done.model) == generated(models[source])
    force(done.model, 1)
    assert (logits(done.model) - expected).abs().max() > 100 * bound


def clip(seed: int) -> Any:
    tower = {**small_models.ENCODER, "vocab_size": 300, "eos_token_id": 299}
    config = transformers.CLIPConfig(
        text_config=tower,
        vision_config={**small_models.ENCODER, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    return transformers.CLIPModel(config).eval()


def test_both_towers_of_a_model_that_was_saved(tmp_path: Path) -> None:
    """CLIP-MoE: one FFN in each block of both towers; the sources are written and given."""
    clip(1).save_pretrained(tmp_path / "stage")
    dense = clip(0)
    done = upcycle.convert(
        dense, "clip-moe", sources=[dense, tmp_path / "stage"], overrides=["experts.count=2"]
    )
    assert len(done.plan.specs) == 4
    assert done.plan.recipe.experts.sources[0] == "base"
    force(done.model, 0)
    batch = {
        "input_ids": TOKENS,
        "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
    }
    with torch.no_grad():
        found, expected = (m(**batch).logits_per_image for m in (done.model, dense))
    # Cosines times a scale, after two blocks of sums of at most 64 products in each tower.
    bound = 300 * torch.finfo(torch.float32).eps * dense.logit_scale.exp()
    assert (found - expected).abs().max() < bound
    other = clip(1)
    other.config.text_config.hidden_act = "relu"
    with pytest.raises(upcycle.UsageError, match=r"text_config\.hidden_act = relu"):
        upcycle.convert(dense, recipe(2), sources=[dense, other])


def test_a_source_may_give_several_experts() -> None:
    models = family(2)
    twice = upcycle.convert(models[0], recipe(4), sources=models)
    listed = upcycle.convert(
        models[0], recipe(4), sources=[models[0], models[0], models[1], models[1]]
    )
    assert twice.plan.recipe.experts.sources == ("base", "LlamaForCausalLM")
    for one, other in zip(layers_of(twice.model), layers_of(listed.model), strict=True):
        assert torch.equal(one.experts.up_EGD, other.experts.up_EGD)
        assert torch.equal(one.experts.up_EGD[1], one.experts.up_EGD[0])
        assert not torch.equal(one.experts.up_EGD[1], one.experts.up_EGD[2])


def test_rows_are_traced_to_their_source() -> None:
    models = family(2)
    done = upcycle.convert(models[0], recipe(2), sources=models)
    assert all(row.untraced_rows == 0 for row in done.report.layers)
    experts = layers_of(done.model)[0].experts
    with torch.no_grad():
        experts.down_proj[1, 0, 7] += 1
    again = done.opened.verify_module(done.measured, done.made)
    assert [row.untraced_rows for row in again.layers or ()] == [1, 0]
    assert set(done.report.sources or ()) == {"source 0 (base)", "source 1 (LlamaForCausalLM)"}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, [*arguments], catch_exceptions=False)


def written(seed: int, directory: Path, name: str = "llama", **changes: Any) -> str:
    torch.manual_seed(seed)
    model = small_models.BUILD[name](**changes).eval()
    model.save_pretrained(directory)
    small_models.tokenizer().save_pretrained(directory)
    return str(directory)


def test_the_command_line_takes_directories(tmp_path: Path) -> None:
    base, other = written(0, tmp_path / "dense"), written(1, tmp_path / "other")
    result = invoke(
        "convert", base, "--recipe", "btx", "--out", str(tmp_path / "out"),
        "--set", f"experts.sources=[base, {other}]", "--set", "experts.count=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["checkpoint"]["architecture"] == "mixtral"
    assert set(report["sources"]) == {"source 0 (base)", "source 1 (other)"}
    assert "source 1 (other)" in result.output
    loaded = upcycle.load(tmp_path / "out")
    models = [upcycle.load(path) for path in (base, other)]
    mean = (models[0].lm_head.weight.double() + models[1].lm_head.weight.double()) / 2
    assert torch.equal(loaded.lm_head.weight, mean.float())
    made = upcycle.convert(
        small_models.build("llama"), "btx", sources=[base, other], overrides=["experts.count=2"]
    )
    assert (logits(made.model) - logits(loaded)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 310}, r"model.embed_tokens.weight is \[310, 32\], and \[300, 32\]"),
        ({"intermediate_size": 72}, r"layers.0.mlp.gate_proj.weight is \[72, 32\]"),
        ({"num_hidden_layers": 1}, "it has no tensor model.layers.1."),
        ({"tie_word_embeddings": True}, "lm_head.weight is tied to another tensor"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps = 0.1, and the dense model's 1e-06"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    base, other = written(0, tmp_path / "a"), written(1, tmp_path / "b", **changes)
    model = small_models.build("llama")
    for wanted in (other, upcycle.load(other)):
        with pytest.raises(upcycle.UsageError, match=words):
            upcycle.convert(model, recipe(2), sources=[model, wanted])
    result = invoke(
        "convert", base, "--recipe", "btx", "--out", str(tmp_path / "out"),
        "--set", f"experts.sources=[base, {other}]", "--set", "experts.count=2",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {other}: ")
    assert "loading" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_architecture_and_a_missing_tensor(tmp_path: Path) -> None:
    model = small_models.build("llama")
    with pytest.raises(upcycle.UsageError, match="it is a Qwen3ForCausalLM, and the dense model"):
        upcycle.convert(model, recipe(2), sources=[model, small_models.build("qwen3")])
    broken = written(1, tmp_path / "broken")
    tensors = load_file(f"{broken}/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, f"{broken}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(upcycle.UsageError, match=r"lack model\.norm\.weight"):
        upcycle.convert(model, recipe(2), sources=[model, broken])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (recipe(2), "there are no models to take experts from"),
        (recipe(3, sources=("base", "base")), "2 sources cannot give 3 experts"),
        (recipe(2, sources=("base", "base"), merge=2), "there is no source 2"),
        (
            recipe(2, method="copy", sources=("base",)),
            "`experts.method: copy` has no sources",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused(made: Recipe, words: str) -> None:
    with pytest.raises(upcycle.PlanError, match=words):
        upcycle.convert(small_models.build("llama"), made)


def test_piece_by_piece_gives_the_same_bytes(tmp_path: Path) -> None:
    base, other = written(0, tmp_path / "dense"), written(1, tmp_path / "other")
    files = {}
    for how in ("--stream", "--no-stream"):
        result = invoke(
            "convert", base, "--recipe", "btx", "--out", str(tmp_path / how), how,
            "--target", "safetensors", "--max-shard-size", "50kB",
            "--set", f"experts.sources=[base, {other}]", "--set", "experts.count=2",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        weights = (tmp_path / how).glob("*.safetensors")
        files[how] = {path.name: path.read_bytes() for path in weights}
    assert len(files["--stream"]) > 1
    assert files["--stream"] == files["--no-stream"]


def test_a_router_that_needs_data_sees_one_model_only(tmp_path: Path) -> None:
    base = written(0, tmp_path / "dense")
    result = invoke(
        "convert", base, "--recipe", "btx", "--out", str(tmp_path / "out"), "--stream",
        "--target", "safetensors", "--set", "experts.sources=[base]", "--set", "experts.count=1",
        "--set", "router.top_k=1", "--set", "router.method=kmeans_lsq",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "cannot be calibrated on the merge" in result.stderr


def test_verify_has_the_rows_of_the_conversion(tmp_path: Path) -> None:
    """Each source, and each layer on the same tokens; or all of it on data of the user."""
    dense = small_models.saved("llama", tmp_path / "base", with_tokenizer=True)
    small_models.build("llama", seed=1).save_pretrained(tmp_path / "law")
    out, sources = tmp_path / "moe", f"experts.sources=[base, {tmp_path / 'law'}]"
    options = ("--set", sources, "--set", "experts.count=2", "--target", "safetensors")
    made = CliRunner().invoke(
        main, [*map(str, ("convert", dense, "--recipe", "btx", *options, "--out", out))]
    )
    assert made.exit_code == 0, made.output
    assert "That text says little of what the sources know." in made.stdout
    again = CliRunner().invoke(main, ["verify", str(dense), str(out)])
    rows = made.stdout[made.stdout.index("compared with the dense") :].splitlines()
    repeated = again.stdout[again.stdout.index("compared with the dense") :].splitlines()
    names = [row.split("  ")[0] for row in rows]
    assert [row.split("  ")[0] for row in repeated[:7]] == names[:7]
    assert [name for name in names if "source" in name][:2] == ["source 0 (base)", "source 1 (law)"]
    assert "measured on the documentation of Python; each layer on the tokens" in again.stdout
    (tmp_path / "own.txt").write_text("a b c x y z " * 200)
    given = ("--data", str(tmp_path / "own.txt"))
    own = CliRunner().invoke(main, ["verify", str(dense), str(out), *given])
    assert "measured on the given text; each layer on" in own.stdout
    assert "says little" not in own.stdout
    none = CliRunner().invoke(main, ["verify", str(dense), str(out), "--data", "nowhere.txt"])
    assert none.exit_code == 2
    assert "--data nowhere.txt: there is no such text" in none.stderr
