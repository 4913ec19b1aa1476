"""``upcycle bench --training``: a training step of both models, apart from inference."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from click.testing import CliRunner
from torch import nn

import upcycle
from upcycle.bench.training import trainer
from upcycle.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize("name", ["llama", "bert", "plain"])
def test_a_step_learns_and_leaves_the_weights(name: str) -> None:
    model: Any = small_models.plain() if name == "plain" else small_models.build(name)
    inputs = small_models.plain_inputs() if name == "plain" else {"input_ids": TOKENS}
    before = copy.deepcopy(model.state_dict())
    seen: list[torch.Tensor] = []
    hooks = [p.register_hook(seen.append) for p in model.parameters()]
    trainer(model, inputs)()
    assert len(hooks) >= len(seen) > 0
    assert any(gradient.abs().max() > 0 for gradient in seen)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_every_parameter_of_a_mixture_is_updated() -> None:
    sets = ["verify.max_relative_error=99", "router.top_k=2", "experts.count=4"]
    dense = small_models.build("llama")
    model: nn.Module = upcycle.convert(dense, "drop-upcycling", overrides=sets).model
    reached: set[str] = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_()
        parameter.register_hook(lambda _, name=name: reached.add(name))
    trainer(model, {"input_ids": TOKENS})()
    assert reached == {name for name, _ in model.named_parameters()}


def test_the_command(tmp_path: Path) -> None:
    dense = small_models.saved("llama", tmp_path / "llama", with_tokenizer=True)
    made = ("convert", dense, "--recipe", "sparse-upcycling", "--target", "safetensors")
    done = run(*made, "--out", tmp_path / "moe")
    assert done.exit_code == 0, done.output
    bench = ("bench", tmp_path / "moe", "--against", dense, "--tokens", "8", "--seconds", "0")
    found = json.loads(run(*bench, "--training", "--json").stdout)
    row, costs = found["training"], found["costs"]
    assert row["tokens"] == 8
    for name in ("dense", "converted"):
        assert row["tokens_per_second"][name] == pytest.approx(8 / row[name]["median"], rel=1e-12)
    rates = row["per_parameter"]
    total, active = costs["parameters_after"], costs["active_parameters"]
    assert rates["active"] / rates["converted"] == pytest.approx(total / active, rel=1e-12)
    assert json.loads(run(*bench, "--json").stdout)["training"] is None
    assert "training it" in run(*bench, "--training").stdout
    refused = run(*bench, "--training", "--engine", "onnx")
    assert refused.exit_code == 2


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
