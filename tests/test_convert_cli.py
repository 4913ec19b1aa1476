"""``upcycle convert``, end to end as a user runs it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_models
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from safetensors import safe_open

from upcycle.cli.main import main
from upcycle.errors import UpcycleError
from upcycle.models import samples

LLAMA_FILES = {
    *("README.md", "config.json", "generation_config.json", "model.onnx", "model.safetensors"),
    *("provenance.json", "recipe.yaml", "report.html", "report.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def convert(model: object, recipe: object, out: Path, *options: object) -> dict[str, Any]:
    done = run("convert", model, "--recipe", recipe, "--out", out, *options)
    assert done.exit_code == 0, done.stderr
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert not list(out.parent.glob(f"{out.name}.*"))
    return report


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    return small_models.saved("llama", directory, with_tokenizer=True)


@pytest.fixture(scope="module")
def mixtral(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "llama"
    convert(llama, "sparse-upcycling", out)
    return out


def test_llama_becomes_mixtral(llama: Path, mixtral: Path) -> None:
    assert {p.name for p in mixtral.iterdir()} == LLAMA_FILES
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, dense = load(mixtral).eval(), load(llama).eval()
    assert type(model) is transformers.MixtralForCausalLM
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).logits, dense(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    session = onnxruntime.InferenceSession(mixtral / "model.onnx")
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    places = np.arange(ids.shape[1]).repeat(len(ids)).reshape(-1, len(ids)).T
    for value in session.get_inputs():
        if value.name == "position_ids":
            feeds[value.name] = places
        elif value.name not in feeds:  # nothing is in the cache yet
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    (logits,) = session.run(["logits"], feeds)
    assert np.abs(logits - theirs.numpy()).max() <= 1e-5 * theirs.abs().max().item()


def test_what_stands_beside_the_weights_is_copied(llama: Path, mixtral: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (mixtral / name).read_bytes() == (llama / name).read_bytes()


def test_the_report(mixtral: Path) -> None:
    report = json.loads((mixtral / "report.json").read_text())
    assert report["promise"] == "exact"
    assert report["recipe"] == "sparse-upcycling"
    assert report["dtype"] == "float32"
    assert report["checkpoint"]["form"] == "native"
    assert report["checkpoint"]["architecture"] == "mixtral"
    assert [c["what"].partition(",")[0] for c in report["checks"]] == [
        "weights changed in conversion",
        "layer",
        "routing of tokens to experts",
        "end to end",
        "files loaded again",
        "greedy text differs from the dense model's",
        "ONNX Runtime against PyTorch",
    ]
    assert all(c["passed"] and c["error"] <= c["allowed"] for c in report["checks"])
    assert [row["path"] for row in report["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(row["relative"] < 1e-6 and row["min_cosine"] > 0.999 for row in report["layers"])
    assert report["largest_error_at"]["layer"] in [row["path"] for row in report["layers"]]
    language = report["end_to_end"]["language_model"]
    assert language["tokens"] == 4 * 511
    assert language["kl"] < 1e-9
    assert language["dense_perplexity"] == pytest.approx(language["converted_perplexity"], 1e-6)
    assert report["end_to_end"]["inputs"] == "the documentation of Python"


def test_the_model_card(mixtral: Path) -> None:
    card = (mixtral / "README.md").read_text()
    for text in (
        "The outputs equal those of the dense model for every input, up to rounding.",
        "| experts per layer | 8 of 64 neurons |",
        "| logits: relative error |",
        "| layer `model.layers.1.mlp` | relative error ",
        "| kl |",
        "| converted perplexity |",
        "AutoModelForCausalLM.from_pretrained(",
        "onnxruntime.InferenceSession(",
        "| llama.cpp | yes: k-quants want",
        "method: copy",
    ):
        assert text in card
    assert "GELU" not in card
    assert "made from the dense model `llama`" in card


def test_no_path_of_this_machine_is_published(llama: Path, mixtral: Path) -> None:
    for path in mixtral.iterdir():
        content = path.read_bytes()
        for place in (llama.parent, mixtral.parent, Path(samples.__file__).parents[1]):
            assert str(place).encode() not in content, path.name


def test_the_table_that_is_printed(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--target", "safetensors")
    done = run("convert", llama, "--recipe", "split-all", "--out", out, *options)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [
        "8",
        "checks:",
        "all",
        "within",
        "what",
        "the",
        "recipe",
        "allows",
    ] in lines  # with lost neurons and with K = N
    assert any(line[:1] == ["model.layers.0.mlp"] and len(line) == 4 for line in lines)
    assert any(line[:1] == ["logits"] and line[-1] == "1.000000" for line in lines)
    assert f"written to {out}" in done.stdout.splitlines()  # before the verdict
    assert done.stderr.splitlines()[0] == "capturing: 0 of 1"
    assert [line for line in done.stderr.splitlines() if ": " not in line] == []


def test_the_recipe_in_the_output_gives_the_same_bytes(
    llama: Path, mixtral: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llama"  # the name of the directory is the title of the card
    convert(llama, mixtral / "recipe.yaml", out)
    ours, theirs = digests(out), digests(mixtral)
    different = {name for name in theirs if ours.get(name) != theirs[name]}
    assert different == {"README.md", "report.html", "report.json"}, "these name the recipe"
    reports = [json.loads((d / "report.json").read_text()) for d in (out, mixtral)]
    assert [r.pop("recipe") for r in reports] == ["recipe.yaml", "sparse-upcycling"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["--target", "safetensors"]), ("bert", ["--target", "safetensors"]), ("vit", [])],
)
def test_the_same_seed_gives_the_same_bytes(name: str, targets: list[str], tmp_path: Path) -> None:
    dense = small_models.saved(name, tmp_path / "dense")
    outs = {}
    for run_name, seed in (("a", 3), ("b", 3), ("c", 4)):
        outs[run_name] = tmp_path / run_name / "moe"
        convert(dense, "granular", outs[run_name], "--seed", seed, *targets)
    a, b, c = (digests(out) for out in outs.values())
    assert a == b
    assert a.keys() == c.keys()
    assert a["model.safetensors"] != c["model.safetensors"]
    assert a["config.json"] == c["config.json"]


def test_set_changes_the_recipe(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--set", "experts.count=4", "--set", "router.top_k=3", "--no-verify")
    convert(llama, "sparse-upcycling", out, *options, "--target", "safetensors")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 3)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["experts"]["count"] == 4


def test_shards(llama: Path, tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    convert(llama, "sparse-upcycling", whole, "--target", "safetensors", "--no-verify")
    report = convert(llama, "sparse-upcycling", sharded, "--max-shard-size", "100kB")
    assert all(c["passed"] for c in report["checks"])
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in sharded.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        assert set(index["weight_map"]) == set(file.keys())
        for name, shard in index["weight_map"].items():
            with safe_open(sharded / shard, framework="pt") as part:
                assert torch.equal(part.get_tensor(name), file.get_tensor(name))


def test_overwrite(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    out.mkdir()
    (out / "old").write_text("old")
    convert(llama, "granular", out, "--overwrite", "--no-verify", "--target", "safetensors")
    assert not (out / "old").exists()
    assert (out / "config.json").is_file()


def test_no_verify(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--no-verify", "--target", "safetensors")
    report = convert(llama, "moefication", out, *options)
    assert report["checks"] == []
    assert "end_to_end" not in report
    assert "The conversion was not verified." in (out / "README.md").read_text()
    assert not (out / "model.onnx").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_dtype(name: str, dtype: str, tmp_path: Path) -> None:
    dense, out = small_models.saved(name, tmp_path / "dense"), tmp_path / "moe"
    report = convert(dense, "sparse-upcycling", out, "--dtype", dtype, "--target", "safetensors")
    assert report["dtype"] == dtype
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == dtype
    with safe_open(out / "model.safetensors", framework="pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    routers = {t for name, t in types.items() if ".router." in name}
    others = {t for name, t in types.items() if ".router." not in name}
    assert others == {getattr(torch, dtype)}
    assert routers == (set() if name == "llama" else {torch.float32})


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_onnx_of_a_bfloat16_checkpoint(name: str, tmp_path: Path) -> None:
    """The file computes in float32, on the numbers of the checkpoint, which it reads."""
    torch.manual_seed(0)
    dense = small_models.build(name).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    out = tmp_path / "moe"
    report = convert(tmp_path / "dense", "sparse-upcycling", out)
    assert report["dtype"] == "bfloat16"
    assert report["checks"][-1]["what"] == "ONNX Runtime against PyTorch"
    assert report["checks"][-1]["error"] < 1e-5
    weights = (out / "model.safetensors").stat().st_size
    beside = out / "model.onnx.data"
    assert not beside.exists() or beside.stat().st_size < weights / 10


def test_a_broken_promise_is_exit_3(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--set", "verify.max_relative_error=1e-4", "--target", "safetensors")
    failed = run("convert", llama, "--recipe", "factorllm", "--out", out, *options)
    assert failed.exit_code == 3
    assert "allowed 0.0001 (of the layers model.layers." in failed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "granular", "moefication", "dynamic-dino"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
def test_the_plan_is_what_is_built(name: str, recipe: str, tmp_path: Path) -> None:
    dense, out = small_models.saved(name, tmp_path / "dense"), tmp_path / "moe"
    planned = json.loads(run("plan", dense, "--recipe", recipe, "--json").stdout)
    report = convert(dense, recipe, out, "--no-verify", "--target", "safetensors")
    auto = {"vit": "AutoModelForImageClassification", "bert": "AutoModelForMaskedLM"}
    loaded = getattr(transformers, auto.get(name, "AutoModelForCausalLM")).from_pretrained(
        out, trust_remote_code=True
    )
    total = sum(p.numel() for p in loaded.parameters())
    idle = 0
    layers = [m for m in loaded.modules() if hasattr(m, "experts") and hasattr(m, "forward")]
    layers = [m for m in layers if isinstance(getattr(m, "experts", None), torch.nn.Module)]
    for layer, spec in zip(layers, planned["layers"], strict=True):
        of_experts = sum(p.numel() for p in layer.experts.parameters())
        assert of_experts % spec["num_experts"] == 0
        idle += of_experts // spec["num_experts"] * (spec["num_experts"] - spec["top_k"])
    assert planned["costs"] == report["costs"]
    assert planned["costs"]["parameters_after"] == total
    assert planned["costs"]["active_parameters"] == total - idle
    header = 20_000
    size = (out / "model.safetensors").stat().st_size
    assert 0 <= size - planned["costs"]["bytes_on_disk"] < header
    assert planned["misses"] == json.loads(run("inspect", dense, "--json").stdout)["misses"]


def test_a_plain_module(tmp_path: Path) -> None:
    out = tmp_path / "moe"
    inputs = ("--inputs", "small_models:plain_inputs")
    report = convert("small_models:plain", "sparse-upcycling", out, *inputs)
    assert report["checkpoint"]["form"] == "module"
    assert report["end_to_end"]["inputs"] == "the given inputs"
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "model.onnx", "model.safetensors", "provenance.json"),
        *("recipe.yaml", "report.html", "report.json"),
        "upcycle.json",
    }
    x = small_models.plain_inputs()[0]
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (made,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = small_models.plain()(x).numpy()
    assert np.abs(made - expected).max() <= 1e-5 * np.abs(expected).max()
    card = (out / "README.md").read_text()
    assert "The ONNX file computes that form too" in card, "GELU must be spoken about"
    assert "upcycle.load(" in card


def test_a_calibration_text_is_used(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    options = ("--calibration", text, "--target", "safetensors")
    report = convert(llama, "sparse-upcycling", tmp_path / "moe", *options)
    assert report["end_to_end"]["inputs"] == "the given text"


def test_bert_tiny(tmp_path: Path) -> None:
    """Real weights, both targets; the sample comes from the cache or from its package."""
    try:
        dense = samples.path("bert-tiny")
    except UpcycleError as error:
        pytest.skip(str(error))
    out = tmp_path / "moe"
    report = convert("sample:bert-tiny", "sparse-upcycling", out)
    assert report["end_to_end"]["relative"] <= 1e-5
    assert report["checkpoint"]["architecture"] == "upcycle_bert"
    model = transformers.AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    given = tokenizer(["A short sentence.", "And a somewhat longer one."], padding=True)
    given = {key: torch.tensor(given[key]) for key in ("input_ids", "attention_mask")}
    reference = transformers.AutoModelForMaskedLM.from_pretrained(dense).eval()
    with torch.no_grad():
        ours, theirs = model(**given).logits, reference(**given).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (logits,) = session.run(["logits"], {key: t.numpy() for key, t in given.items()})
    kept = given["attention_mask"].bool().numpy()
    assert np.abs(logits - theirs.numpy())[kept].max() <= 1e-5 * theirs.abs().max().item()
    assert "GELU" in (out / "README.md").read_text()
