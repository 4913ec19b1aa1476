"""``upcycle init``: from a goal to a recipe that converts."""

import json
import re
from pathlib import Path

import pytest
import small_models
import yaml
from click.testing import CliRunner
from command_line import run

from upcycle.cli.main import main
from upcycle.recipe.reader import dump_recipe, load_recipe
from upcycle.recipe.rewrite import with_value, with_values
from upcycle.recipe.shipped import recipe_names, recipe_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "llama"
    return small_models.saved("llama", folder, with_tokenizer=True)


def test_the_recipe_it_writes_converts(llama: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "moe"
    said = run("init", llama, "--goal", "train", "--out", recipe).stdout
    assert said.splitlines()[-1] == (
        f"  upcycle convert {llama} --recipe {recipe} --target safetensors "
        "--out llama-sparse-upcycling"
    )
    assert load_recipe(str(recipe)) == load_recipe("sparse-upcycling")
    text = recipe.read_text()
    assert text.startswith(f"# For {llama}, --goal train.\n# sparse-upcycling: ")
    assert "# work of a token, in converted FFNs: 2.0" in text
    run("convert", llama, "--recipe", recipe, "--target", "safetensors", "--out", out)
    assert json.loads((out / "report.json").read_text())["promise"] == "exact"


def test_each_goal_has_proposals_with_their_costs(llama: Path, tmp_path: Path) -> None:
    for goal, first, work in (("train", "sparse-upcycling", 2.0), ("faster", "upcycle", 0.5)):
        arguments = ("init", llama, "--goal", goal, "--json", "--out", tmp_path / goal)
        data = json.loads(run(*arguments).stdout)
        assert len(data["proposals"]) >= 2
        assert data["proposals"][0]["recipe"] == first
        costs = data["proposals"][0]["costs"]
        assert costs["flops_after"] / costs["flops_before"] == pytest.approx(work, abs=0.15)
        for proposal in data["proposals"]:
            assert proposal["quality"]
            assert proposal["training"]
    assert "times that of the dense model on sample:smollm2" in data["proposals"][0]["quality"]
    made = run("init", "sample:bert-tiny", "--goal", "faster", "--json", "--out", tmp_path / "e")
    encoder = json.loads(made.stdout)  # a model that writes no text is compared with another
    assert "on sample:minilm" in encoder["proposals"][0]["quality"]
    assert "emoe" in encoder["refused"]  # it has no upper half to take every second FFN of


def test_memory_takes_experts_away(llama: Path, tmp_path: Path) -> None:
    whole = json.loads(
        run("init", llama, "--goal", "train", "--json", "--out", tmp_path / "a").stdout
    )["proposals"][0]
    limit = whole["costs"]["bytes_on_disk"] - 1
    made = run(
        "init", llama, "--goal", "train", "--memory", limit, "--json", "--out", tmp_path / "b"
    )
    first = json.loads(made.stdout)["proposals"][0]
    assert first["overrides"] == ["experts.count=4"]
    assert first["costs"]["bytes_on_disk"] <= limit
    assert load_recipe(str(tmp_path / "b")).experts.count == 4
    none = run("init", llama, "--goal", "train", "--memory", "1kB", "--out", tmp_path / "c", code=2)
    assert "no recipe for --goal train fits" in none.stderr
    assert not (tmp_path / "c").exists()


def test_merging_names_the_others(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    refused = run("init", llama, "--goal", "merge", "--out", recipe, code=2)
    assert "name the other models" in refused.stderr
    assert "PEFT adapters" in refused.stderr
    assert "--source" in refused.stderr
    other = small_models.saved("llama", tmp_path / "other")
    third = small_models.saved("llama", tmp_path / "third")
    recipe = tmp_path / "new" / "recipe.yaml"  # folders are made
    named = ("--source", other, "--source", third)
    said = run("init", llama, "--goal", "merge", *named, "--out", recipe).stdout
    assert "PEFT adapter" in said
    assert "--out llama-btx" in said
    made = load_recipe(str(recipe)).experts
    assert (made.sources, made.count) == (("base", str(other), str(third)), 3)
    quick = ("--target", "safetensors", "--set", "verify.max_relative_error=9")
    run("convert", llama, "--recipe", recipe, *quick, "--out", tmp_path / "moe")


def test_what_a_runtime_cannot_run_is_not_proposed(tmp_path: Path) -> None:
    refused = run("init", "sample:bert-tiny", "--goal", "train", "--runtime", "vllm", "--out",
                  tmp_path / "r", code=2)  # fmt: skip
    assert "--runtime vllm" in refused.stderr


def test_choosing(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    run("init", llama, "--goal", "train", "--choose", "granular", "--out", recipe)
    assert load_recipe(str(recipe)) == load_recipe("granular")
    assert "exists" in run("init", llama, "--goal", "train", "--out", recipe, code=2).stderr
    nowhere = run("init", llama, "--goal", "train", "--out", "/proc/nothing/r.yaml", code=2)
    assert "/proc/nothing/r.yaml: it cannot be written" in nowhere.stderr
    wrong = run("init", llama, "--goal", "train", "--choose", "emoe", "--out", recipe,
                "--overwrite", code=2)  # fmt: skip
    assert "choose from sparse-upcycling, granular, drop-upcycling" in wrong.stderr
    assert load_recipe(str(recipe)) == load_recipe("granular")  # as it was


def test_it_asks_only_where_somebody_can_answer(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert "--goal is missing" in run("init", llama, "--out", recipe, code=2).stderr
    monkeypatch.setattr("upcycle.cli.commands.init._can_answer", lambda: True)
    asked = CliRunner().invoke(
        main, ["init", str(llama), "--out", str(recipe)], input="train\ngranular\n"
    )
    assert asked.exit_code == 0, asked.stderr
    assert load_recipe(str(recipe)) == load_recipe("granular")


@pytest.mark.parametrize("name", recipe_names())
def test_overrides_in_the_text_are_those_of_the_command_line(name: str) -> None:
    overrides = ["experts.count=4", "router.top_k=1", "onnx.form=quantised", "onnx.quantise=8"]
    text = with_values(recipe_text(name), overrides)
    expected = load_recipe(name, overrides)
    loaded = yaml.safe_load(text)
    assert loaded["experts"]["count"] == 4
    assert yaml.safe_load(dump_recipe(expected))["experts"]["count"] == 4
    assert loaded["onnx"] == {"form": "quantised", "quantise": 8}
    comments = re.findall(r"#.*", recipe_text(name))
    assert re.findall(r"#.*", text) == comments


def test_a_value_is_replaced_in_its_section_alone() -> None:
    text = "a:\n  count: 1   # one\nb:\n  count: 2\n"
    assert with_value(text, "b", "count", "3") == "a:\n  count: 1   # one\nb:\n  count: 3\n"
    assert with_value(text, "a", "count", "3") == "a:\n  count: 3   # one\nb:\n  count: 2\n"
    assert with_value(text, "a", "k", "3") == "a:\n  k: 3\n  count: 1   # one\nb:\n  count: 2\n"
    assert with_value(text, "c", "k", "3") == text + "c:\n  k: 3\n"


def test_smaller_is_fewer_bytes_than_the_dense_model(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    made = run("init", "sample:bert-tiny", "--goal", "smaller", "--json", "--out", recipe)
    found = json.loads(made.stdout)
    assert found["proposals"][0]["recipe"] == "split-all"  # exact, but for the rounding
    assert found["next"].endswith("--out bert-tiny-split-all-int8")
    for proposal in found["proposals"]:
        assert proposal["overrides"] == ["onnx.weights=int8"]
        assert proposal["bytes_rounded"] < proposal["costs"]["bytes_before"]
    assert load_recipe(str(recipe)).onnx.weights == "int8"
    tiny = run("init", "sample:bert-tiny", "--goal", "smaller", "--memory", "1MB", "--out",
               tmp_path / "x", code=2)  # fmt: skip
    assert "are allowed" in tiny.stderr
