"""A layer has one name wherever people read it: the path of the FFN that it was made of."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from command_line import run

import upcycle
from upcycle.routing.contract import routed_layers
from upcycle.targets.provenance_file import read_origins

NAMES = ("bert.encoder.layer.0", "bert.encoder.layer.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT, whose FFNs are siblings: the module of a layer has another path than its FFN."""
    folder = tmp_path_factory.mktemp("names") / "moe"
    done = upcycle.convert(small_models.build("bert"), "granular", overrides=["experts.count=2"])
    done.save(folder)
    assert tuple(layer.path for layer in routed_layers(done.model)) == NAMES
    return folder


def test_a_trace_has_the_names_of_the_conversion(folder: Path, tmp_path: Path) -> None:
    origins = read_origins(folder)
    assert origins is not None
    assert tuple(layer["path"] for layer in origins) == NAMES
    tokens = torch.randint(3, 90, (2, 8))
    torch.save({"input_ids": tokens}, tmp_path / "ids.pt")
    data = ("--data", tmp_path / "ids.pt", "--allow-pickle")
    run("trace", folder, *data, "--out", tmp_path / "t.npz")
    found = json.loads(run("inspect", folder, "--trace", tmp_path / "t.npz", "--json").stdout)
    assert tuple(layer["path"] for layer in found["layers"]) == NAMES


def test_a_trained_model_has_them_without_its_report(folder: Path, tmp_path: Path) -> None:
    model: Any = upcycle.load(folder)
    model.save_pretrained(tmp_path / "trained")
    found = json.loads(run("inspect", tmp_path / "trained", "--json").stdout)
    assert tuple(layer["path"] for layer in found["layers"]) == NAMES


def test_the_names_change_with_the_head(folder: Path) -> None:
    """The FFN of the model that is there, and a name by which its routing is changed."""
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    assert [layer.path for layer in routed_layers(model)] == ["encoder.layer.0", "encoder.layer.1"]
    tokens = torch.randint(3, 90, (2, 8))
    with upcycle.override(model, k={"encoder.layer.1": 1}), upcycle.trace(model) as seen:
        model(input_ids=tokens)
    assert [layer.shape[-1] for layer in seen.result().index] == [4, 1]
