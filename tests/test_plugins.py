"""Expert methods of others, and what a recipe says of all methods: registered, installed, or in the
place of a name."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numerics
import onnxruntime
import pytest
import small_models
import torch
from plugin_case import backwards, install, mlp, run, strided
from pydantic import BaseModel, Field

import upcycle
from upcycle.passes.experts.matrices import own_copies
from upcycle.passes.experts.split import split
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import load_recipe, recipe_schema
from upcycle.util.registry import installed

pytestmark = pytest.mark.usefixtures("own_registries")


def test_the_example_of_the_handbook_converts_a_model_from_outside(
    site: Path, tmp_path: Path
) -> None:
    """By the command line, with both targets; the files have what the method made."""
    strided(site)
    out = tmp_path / "out"
    given = ["--recipe", "split-all", "--set", "experts.method=strided"]
    ran = run("convert", "sample:bert-tiny", *given, "--out", out, "--target", "onnx")
    assert ran.exit_code == 0, ran.output
    origin = json.loads((out / "report.json").read_text())
    assert origin["resolved_recipe"]["experts"]["method"] == "strided"
    assert origin["end_to_end"]["relative"] < 1e-5
    inputs = {n.name for n in onnxruntime.InferenceSession(out / "model.onnx").get_inputs()}
    assert "input_ids" in inputs
    again = run("verify", "sample:bert-tiny", out)
    assert again.exit_code == 0, again.output
    plain = run("plan", "sample:bert-tiny", "--recipe", out / "recipe.yaml")
    assert plain.exit_code == 0, plain.output


def test_a_package_is_imported_when_its_name_is_met_and_not_before(site: Path) -> None:
    strided(site)
    load_recipe("moefication")
    assert "strided" in recipe_schema()["$defs"]["Experts"]["properties"]["method"]["enum"]
    run("recipes")
    with pytest.raises(upcycle.RecipeError, match="did you mean strided"):
        load_recipe("moefication", ["experts.method=stride"])
    sys.modules.pop("strided_experts", None)  # the schema reads the options of what is installed
    installed.cache_clear()
    load_recipe("moefication", ["experts.count=4"])
    assert "strided_experts" not in sys.modules


def test_what_is_unknown_is_told_with_what_there_is(site: Path) -> None:
    strided(site)
    with pytest.raises(upcycle.RecipeError) as error:
        load_recipe("moefication", ["experts.method=strid"])
    assert "copy, noise" in str(error.value)
    assert 'installed or registered: strided, not "strid"; did you mean strided?' in str(
        error.value
    )
    with pytest.raises(upcycle.RecipeError) as error:
        load_recipe("moefication", ["router.method=nromal"])
    assert 'not "nromal"; did you mean normal?' in str(error.value)
    assert "installed" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import a_module_that_nobody_has\n", "cannot be loaded: ModuleNotFoundError: No module"),
        ("x = 1\n", "was imported and registers no 'broken'"),
    ],
)
def test_a_package_that_fails_is_named(site: Path, text: str, words: str) -> None:
    points = "[upcycle.experts]\nbroken = broken_experts\n"
    install(site, "broken-experts", points, broken_experts=text)
    ran = run("plan", "sample:bert-tiny", "--recipe", "emoe", "--set", "experts.method=broken")
    assert ran.exit_code == 2
    assert "the package broken-experts: its entry point `broken = broken_experts`" in ran.output
    assert words in ran.output
    assert run("schema").exit_code == 0  # what is broken does not stop what does not need it
    load_recipe("emoe")


def test_two_packages_of_one_name_are_named(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    strided(site)
    install(site, "others", "[upcycle.experts]\nstrided = others\ncopy = others\n", others="")
    with pytest.raises(upcycle.UsageError, match=r"the package .*, and the package .*; remove one"):
        load_recipe("moefication", ["experts.method=strided"])
    assert load_recipe("sparse-upcycling").experts.method == "copy"
    recipe_schema()
    assert "`copy = others` of upcycle.experts is not used: upcycle has that name" in caplog.text


def test_metadata_is_read_for_a_name_that_is_not_built_in_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(**_: str) -> None:
        raise AssertionError("the metadata of all packages were read")

    monkeypatch.setattr("upcycle.util.registry.entry_points", read)
    installed.cache_clear()
    assert run("recipes").exit_code == 0
    load_recipe("moefication", ["experts.count=4"])
    with pytest.raises(AssertionError, match="were read"):
        load_recipe("moefication", ["experts.method=strided"])


def test_a_taken_name_is_refused() -> None:
    upcycle.register_expert_method("mine", split(backwards), kind="split")
    with pytest.raises(upcycle.UsageError, match="`copy`: an expert method of this name is built"):
        upcycle.register_expert_method("copy", backwards, kind="split")
    with pytest.raises(upcycle.UsageError, match=r"`mine`: an expert .* registered by plugin_case"):
        upcycle.register_expert_method("mine", run, kind="split")
    upcycle.register_expert_method("mine", split(backwards), kind="split")  # the cell was run again
    with pytest.raises(upcycle.UsageError, match="`normal`: a router method of this name is built"):
        upcycle.register_router("normal", backwards)
    with pytest.raises(upcycle.UsageError, match="`relu`: an activation of this name is built in"):
        upcycle.register_activation("relu", torch.sinc)
    with pytest.raises(upcycle.UsageError, match="`kind=parts`: unknown; choose from copies"):
        upcycle.register_expert_method("other", backwards, kind="parts")  # type: ignore[arg-type]
    with pytest.raises(upcycle.UsageError, match="'a name' is no name"):
        upcycle.register_router("a name", backwards)


@dataclass(frozen=True)
class Turn:
    step: int = 7


class TurnModel(BaseModel):
    step: int = Field(7, ge=1)


@pytest.mark.parametrize("options", [Turn, TurnModel])
def test_options_are_checked_and_in_the_schema(options: type[Any]) -> None:
    seen = []

    def turned(dense: upcycle.DenseLayer) -> torch.Tensor:
        seen.append(dense.spec.experts.options.step)
        return backwards(dense)

    upcycle.register_expert_method("turned", split(turned), kind="split", options=options)
    given = ["experts.method=turned", "experts.options.step=3"]
    result = upcycle.convert(mlp(), "split-all", overrides=given)
    assert seen == [3]
    written = result.report.to_json()["resolved_recipe"]
    assert written["experts"]["options"] == {"step": 3}
    assert upcycle.Recipe.model_validate_json(json.dumps(written)) == result.plan.recipe
    (rule,) = recipe_schema()["$defs"]["Experts"]["allOf"]
    assert rule["if"] == {"properties": {"method": {"const": "turned"}}}
    assert rule["then"]["properties"]["options"]["properties"]["step"]["default"] == 7
    for wrong, words in (
        (
            "experts.options.stop=3",
            "experts.options.stop: unknown key, did you mean experts.options",
        ),
        ("experts.options.step=x", 'experts.options.step: must be a whole number.*, not "x"'),
        ("experts.options=3", "experts.options: must be a section with the keys step, not 3"),
    ):
        with pytest.raises(upcycle.RecipeError, match=words):
            load_recipe("split-all", [given[0], wrong])
    with pytest.raises(upcycle.RecipeError, match="`method: cluster` has no options of its own"):
        load_recipe("split-all", [given[1]])
    assert "options" not in load_recipe("split-all").model_dump()["experts"]


def test_a_function_in_the_place_of_a_name() -> None:
    """It is used, and what is written of it is data that leads to no import."""
    method = upcycle.ExpertMethod("any", kind="split", build=split(backwards))
    made: Any = {
        "experts": {"method": method, "count": 4},
        "router": {"method": lambda dense, parts: torch.eye(4, 32), "top_k": 4, "weights": "one"},
    }
    result = upcycle.convert(mlp(), upcycle.Recipe.model_validate(made))
    (layer,) = [m for m in result.model.modules() if isinstance(m, upcycle.MoE)]
    assert torch.equal(layer.router.weight, torch.eye(4, 32))
    (origin,) = result.provenance.values()
    assert origin.expert_EI[0].tolist() == [*range(96, 128)]
    written = result.report.to_json()["resolved_recipe"]
    assert written["experts"]["method"] == f"{backwards.__module__}:backwards"
    text = json.dumps(written)
    with pytest.raises(ValueError, match="pass the function itself in Python, or register it"):
        upcycle.Recipe.model_validate_json(text)


def test_a_plain_function_makes_altered_copies_in_a_native_architecture(tmp_path: Path) -> None:
    def louder(dense: upcycle.DenseLayer) -> upcycle.Parts:
        experts = own_copies(dense)
        experts.down_EOI.mul_(1 + torch.arange(dense.spec.num_experts)[:, None, None] / 100)
        experts.neuron_EI.fill_(-2)
        return upcycle.Parts(experts)

    torch.manual_seed(0)
    given = [("experts.method", louder), "verify.max_relative_error=0.5"]
    result = upcycle.convert(small_models.llama().eval(), "sparse-upcycling", overrides=given)
    assert result.plan.promise == "approximate"
    assert result.save(tmp_path / "out").checkpoint.architecture == "mixtral"
    result.dense.save_pretrained(tmp_path / "dense")
    told = run("verify", tmp_path / "dense", tmp_path / "out")
    assert told.exit_code == 2
    assert "louder` is a Python function, which is never looked up" in told.output
    assert "`upcycle.verify(dense, converted)` in Python compares" in told.output
    found = upcycle.verify(result.dense, upcycle.load(tmp_path / "out"))
    assert 0 < found.relative < 0.5


def test_what_another_process_does_not_know_is_told() -> None:
    """As a worker of a cluster, which gets the spec and not the function."""
    given = [("experts.method", upcycle.ExpertMethod("m", "split", split(backwards)))]
    spec = upcycle.convert(mlp(), "split-all", overrides=given).plan.specs[0]
    renamed = replace(spec, experts=spec.experts.model_copy(update={"method": "elsewhere"}))
    with pytest.raises(upcycle.PlanError, match=r"method: elsewhere` is not known in this"):
        transform(numerics.random_ffn("relu"), renamed)


def test_a_function_in_the_overrides_and_two_of_one_name() -> None:
    def named(rows: torch.Tensor) -> Any:
        def build(dense: upcycle.DenseLayer, parts: upcycle.Parts) -> torch.Tensor:
            return rows

        return build

    for rows in (torch.eye(16, 32), 2 * torch.eye(16, 32)):
        given = [("router.method", named(rows)), "verify.max_relative_error=1"]
        result = upcycle.convert(mlp(), "split-all", overrides=given)
        (layer,) = [m for m in result.model.modules() if isinstance(m, upcycle.MoE)]
        assert torch.equal(layer.router.weight, rows)
    assert result.plan.recipe.router.method.endswith(".build (2)")
    with pytest.raises(upcycle.RecipeError, match="is a Python function"):
        load_recipe("split-all", [f"router.method={result.plan.recipe.router.method}"])
    with pytest.raises(upcycle.RecipeError, match="write it as 'seed=VALUE'"):
        load_recipe("split-all", [("seed", 3)])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda dense: dense.nothing, "failed with AttributeError: "),
        (lambda dense: torch.ones(3), "returned Tensor; return `Parts`"),
        (
            split(lambda dense: torch.arange(128).view(16, 8)),
            "for the kind `altered`, says (16, 128, 32)",
        ),
    ],
)
def test_what_a_method_gets_wrong_is_told(build: Any, words: str) -> None:
    with pytest.raises(upcycle.PlanError) as error:
        upcycle.convert(
            mlp(), "split-all", overrides=[("experts.method", build), "router.method=normal"]
        )
    assert words in str(error.value)
    assert f"`experts.method: {__name__}:" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            torch.ones(3, 32),
            "made the tensors {'weight': (3, 32)}, and the router has {'weight': (",
        ),
        ([1.0], "returned list; return a tensor"),
    ],
)
def test_what_a_router_gets_wrong_is_told(rows: Any, words: str) -> None:
    given = [("router.method", lambda dense, parts: rows)]
    with pytest.raises(upcycle.PlanError) as error:
        upcycle.convert(mlp(), "split-all", overrides=given)
    assert words in str(error.value)
