"""Methods, routers and activations of others: registered, installed, or in the place of a name."""

import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numerics
import onnxruntime
import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from remote_case import without_upcycle
from torch import nn
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.cli.main import main
from upcycle.layers.router import Router
from upcycle.passes.experts.matrices import own_copies
from upcycle.passes.experts.split import deal, split
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import load_recipe, recipe_schema
from upcycle.util.registry import installed

pytestmark = pytest.mark.usefixtures("own_registries")
ROOT = Path(__file__).parents[1]
EXAMPLE = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]

DISTANCE = '''
"""A router of distances."""

import torch
from torch import nn

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router


class DistanceRouter(Router):
    """Scores an expert by how near a token is to its centre."""

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        self.sharpness = config.options["sharpness"]
        self.centre = nn.Parameter(torch.zeros(rows, d_model))

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        apart_TED = x_TD[:, None] - self.centre.to(x_TD.dtype)
        return -self.sharpness * apart_TED.square().sum(-1)
'''
REGISTERED = """
import torch
import upcycle
from {home} import DistanceRouter

@upcycle.register_router("distance", makes=DistanceRouter, facts=lambda *_: {{"sharpness": 0.5}})
def distance(dense, parts):
    shape = dense.spec.num_experts, dense.d_model
    return {{"centre": torch.randn(shape, generator=dense.generator)}}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages on `sys.path`, whose modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def install(site: Path, package: str, points: str, **modules: str) -> None:
    """What pip leaves of a package."""
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(textwrap.dedent(points))
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text.lstrip())
    installed.cache_clear()


def strided(site: Path) -> None:
    points = "[upcycle.experts]\nstrided = strided_experts\n"
    install(site, "strided-experts", points, strided_experts=EXAMPLE)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).eval()


def backwards(dense: upcycle.DenseLayer) -> torch.Tensor:
    """The last neurons first."""
    order = torch.arange(dense.d_ff).flip(0)
    return deal(order, dense.spec.num_experts, dense.spec.width)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
    with pytest.raises(upcycle.UsageError, match=f"`mine`: an expert .* registered by {__name__}"):
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
    assert written["experts"]["method"] == f"{__name__}:backwards"
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


def test_a_router_class_reaches_files_with_and_without_upcycle(site: Path, tmp_path: Path) -> None:
    """The modeling file has the text of the class; upcycle finds it by the entry point."""
    points = "[upcycle.routers]\ndistance = distance_methods\n"
    modules = {"distance_router": DISTANCE}
    modules["distance_methods"] = REGISTERED.format(home="distance_router")
    install(site, "distance", points, **modules)
    torch.manual_seed(0)
    dense = small_models.llama().eval()
    given = ["router.method=distance", "experts.count=4"]
    result = upcycle.convert(dense, "sparse-upcycling", overrides=given)
    result.save(tmp_path / "out", targets=["safetensors", "onnx"])
    text = (tmp_path / "out" / "modeling_upcycle.py").read_text()
    assert 'OTHER_KINDS["distance"] = DistanceRouter' in text
    ids = torch.arange(12)[None] + 5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    far = without_upcycle(
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
        "\nlogits = floats(m, {'input_ids': torch.arange(12)[None] + 5})"
        "\nprint(json.dumps(logits.flatten().tolist()))",
        tmp_path / "out",
    )
    there = torch.tensor(far, dtype=torch.float64).view_as(result.model(ids).logits)
    bound = 1e-5 * there.abs().max()  # other kernels, in float32
    assert (there - result.model(ids).logits).abs().max() < bound


def test_a_router_whose_text_cannot_be_copied_is_refused_with_the_reason(
    site: Path, tmp_path: Path
) -> None:
    points = "[upcycle.routers]\ndistance = distance_methods\n"
    text = DISTANCE + REGISTERED.format(home="distance_methods").replace("import torch", "", 1)
    install(site, "distance", points, distance_methods=text.replace("from distance_methods", "#"))
    torch.manual_seed(0)
    dense = small_models.llama().eval()
    result = upcycle.convert(dense, "sparse-upcycling", overrides=["router.method=distance"])
    with pytest.raises(upcycle.UnsupportedError) as error:
        result.save(tmp_path / "out")
    assert "the router `distance` cannot be copied into a self-contained" in str(error.value)
    assert "imports upcycle, which the file cannot have" in str(error.value)
    assert not (tmp_path / "out").exists()
    plain = upcycle.convert(mlp(), "sparse-upcycling", overrides=["router.method=distance"])
    plain.save(tmp_path / "plain")
    loaded, x = upcycle.load(tmp_path / "plain", mlp()), torch.randn(5, 32)
    assert torch.equal(loaded(x), plain.model(x))


class Listed(Router):
    """A linear router by way of Python numbers, which no exporter follows."""

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().scores(torch.tensor(x_TD.tolist(), dtype=x_TD.dtype))


class ListedForOnnx(Listed):
    def onnx_scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        return Router.scores(self, x_TD)


def test_scores_for_onnx_take_the_place_of_those_that_cannot_be_exported(tmp_path: Path) -> None:
    for name, kind in (("listed", Listed), ("listed_for_onnx", ListedForOnnx)):
        rows = {"weight": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))}
        upcycle.register_router(name, lambda dense, parts, rows=rows: rows, makes=kind)
        given = [f"router.method={name}"]
        result = upcycle.convert(mlp(), "sparse-upcycling", overrides=given)
        if kind is Listed:
            with pytest.raises(upcycle.UnsupportedError, match=r"torch\.onnx cannot export"):
                result.save(tmp_path / name, targets=["safetensors", "onnx"])
        else:
            result.save(tmp_path / name, targets=["safetensors", "onnx"])  # and compares


def test_a_description_with_an_unknown_router_is_refused(site: Path, tmp_path: Path) -> None:
    points = "[upcycle.routers]\ndistance = distance_methods\n"
    modules = {"distance_router": DISTANCE}
    modules["distance_methods"] = REGISTERED.format(home="distance_router")
    install(site, "distance", points, **modules)
    given = ["router.method=distance"]
    upcycle.convert(mlp(), "sparse-upcycling", overrides=given).save(tmp_path / "out")
    description = tmp_path / "out" / "upcycle.json"
    text = description.read_text().replace('"distance"', '"distant"')
    description.write_text(text)
    with pytest.raises(upcycle.UpcycleError, match=r"kind is 'distant' and not one of linear"):
        upcycle.load(tmp_path / "out", mlp())


class Sinc(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sinc(x)


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sinc(self.up(x)))


def sinc_nodes(n: Any, x: Any) -> Any:
    turn = n("Mul", x, n.const(3.141592653589793))
    whole = n("Div", n("Sin", turn), turn)
    return n("Where", n("Equal", x, n.const(0.0)), n.const(1.0), whole)


def test_an_activation_is_located_written_and_read(tmp_path: Path) -> None:
    model = Wave().eval()
    assert not upcycle.locate(model, (torch.ones(2, 32),)).ffns
    upcycle.register_activation("sinc", torch.sinc)
    (ffn,) = upcycle.locate(model, (torch.ones(2, 32),)).ffns
    assert ffn.pointwise.name == "sinc"
    result = upcycle.convert(model, "split-all", (torch.ones(2, 32),))
    result.save(tmp_path / "out")
    loaded, x = upcycle.load(tmp_path / "out", Wave()), torch.randn(5, 32)
    assert torch.equal(loaded(x), result.model(x))
    with pytest.raises(upcycle.UnsupportedError, match="register it with `onnx`"):
        result.save(tmp_path / "graph", targets=["safetensors", "onnx"])
    upcycle.register_activation("sinc", torch.sinc, onnx=sinc_nodes)
    result.save(tmp_path / "graph", targets=["safetensors", "onnx"])  # and compares


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.softmax(-1), "is not pointwise: an element that was moved moved others"),
        (lambda x: x.sum(), "it makes torch.float32 \\[\\] of float32 \\[25\\]"),
        (lambda x, y: x, "it fails on a tensor of 25 numbers: TypeError"),
    ],
)
def test_what_is_no_activation_is_refused(function: Any, words: str) -> None:
    with pytest.raises(upcycle.UsageError, match=words):
        upcycle.register_activation("odd", function)


def test_an_activation_in_a_self_contained_file(tmp_path: Path) -> None:
    upcycle.register_activation("sinc", torch.sinc)
    torch.manual_seed(0)
    dense = small_models.llama().eval()
    for layer in dense.model.layers:
        layer.mlp.act_fn = Sinc()
    result = upcycle.convert(dense, "split-all")
    result.save(tmp_path / "out", verify=False)  # the dense class itself has another activation
    text = (tmp_path / "out" / "modeling_upcycle.py").read_text()
    assert 'OPS["sinc"] = torch.sinc' in text
