"""Routers and activations of others, in memory, in files and without upcycle."""

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from plugin_case import DISTANCE, REGISTERED, install, mlp
from remote_case import without_upcycle
from torch import nn
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.layers.router import Router

pytestmark = pytest.mark.usefixtures("own_registries")


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
