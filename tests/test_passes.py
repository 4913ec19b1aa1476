"""The passes of a conversion: a list that prints itself, and a contract for each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from command_line import run
from torch import fx, nn
from zoo_facts import SPLIT_ALL

import upcycle
from upcycle.capture.capture import capture
from upcycle.cli.commands.convert import PASS_NAMES
from upcycle.conversion.passes import (
    NAMES,
    PASSES,
    BrokenPassError,
    Watch,
    are_apart,
    is_complete,
    is_recorded,
    is_rewritten,
)
from upcycle.graphs.layer_passes import CallLayers, EraseUnread
from upcycle.passes.plan.plan import make_plan

X = (torch.randn(4, 8),)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def two() -> nn.Module:
    return nn.Sequential(mlp(), mlp())


def test_the_command_line_knows_every_pass() -> None:
    assert PASS_NAMES == NAMES
    listed = json.loads(run("passes", "--json").output)
    assert [one["name"] for one in listed] == list(NAMES)
    assert all(name in run("passes").output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stops_after_any_pass(name: str, tmp_path: Path) -> None:
    model = small_models.saved("bert", tmp_path / "dense")
    out = tmp_path / "out"
    printed = run("convert", model, "--recipe", "sparse-upcycling", "--target", "safetensors",
                  "--out", out, "--print-after", name, "--stop-after", name).output  # fmt: skip
    assert f"after {name}\n" in printed
    assert f"stopped after {name}; nothing was written" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_a_pass_made_is_printed(tmp_path: Path) -> None:
    model = small_models.saved("bert", tmp_path / "dense")
    shown = [f"--print-after={name}" for name in NAMES]
    printed = run("convert", model, "--recipe", "sparse-upcycling", "--target", "safetensors",
                  "--out", tmp_path / "out", *shown).output  # fmt: skip
    assert "modeling_bert.py:" in printed.partition("after locate")[0]
    assert "encoder.layer.1" in printed.partition("after plan")[2].partition("after transform")[0]
    assert "TappedMoE" in printed.partition("after rewrite")[2]
    assert "model.safetensors" in printed.partition("after lower")[2]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_text_and_json_do_not_mix(tmp_path: Path) -> None:
    model = small_models.saved("bert", tmp_path / "dense")
    refused = run("convert", model, "--recipe", "emoe", "--out", tmp_path / "out", "--json",
                  "--print-after", "plan", code=2)  # fmt: skip
    assert "--json" in refused.output


# -- contracts


def test_a_graph_has_an_output_and_modules() -> None:
    program = capture(mlp(), X)
    is_recorded(program)
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    del node.meta["path"]
    with pytest.raises(BrokenPassError, match="comes from no module"):
        is_recorded(program)


def test_no_two_ffns_have_one_weight() -> None:
    located = upcycle.locate(two(), X)
    are_apart(located)
    first, second = located.ffns
    with pytest.raises(BrokenPassError, match="path"):
        are_apart(replace(located, ffns=(first, replace(second, path=first.path))))
    with pytest.raises(BrokenPassError, match="weight"):
        are_apart(replace(located, ffns=(first, replace(second, contraction=first.contraction))))


def test_what_is_planned_was_located_once() -> None:
    plan = make_plan(upcycle.locate(two(), X), SPLIT_ALL, recipe_name="test")
    is_complete(plan)
    with pytest.raises(BrokenPassError, match="planned twice"):
        is_complete(replace(plan, specs=(plan.specs[0], plan.specs[0])))


def test_no_dense_weight_is_left() -> None:
    done = upcycle.convert(two(), SPLIT_ALL, X, verify=False)
    is_rewritten((done.model, done.plan))
    place: Any = done.model.get_submodule("0")
    done.model.set_submodule("0", nn.Identity())
    with pytest.raises(BrokenPassError, match="no layer"):
        is_rewritten((done.model, done.plan))
    done.model.set_submodule("0", place)
    place.register_module("0", nn.Linear(8, 32))
    with pytest.raises(BrokenPassError, match="is left"):
        is_rewritten((done.model, done.plan))


def test_the_watch_checks_what_nobody_looks_at() -> None:
    located = upcycle.locate(two(), X)
    broken = replace(located, ffns=(located.ffns[0], located.ffns[0]))
    with pytest.raises(BrokenPassError):
        Watch({})("locate", broken)


def test_every_pass_of_a_graph_has_conditions() -> None:
    graph = fx.symbolic_trace(mlp())
    with pytest.raises(ValueError, match="has no node nothing"):
        CallLayers({"mlp": [("nothing", "_2")]}, {}).requires(graph)
    with pytest.raises(ValueError, match="does not depend on"):
        CallLayers({"mlp": [("_2", "_0")]}, {}).requires(graph)
    with pytest.raises(AssertionError, match="still read"):
        CallLayers({"mlp": [("input_1", "_2")]}, {}).ensures(graph)
    (output,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(output):
        unread = graph.graph.call_function(torch.relu, tuple(output.all_input_nodes))
    with pytest.raises(AssertionError, match="still there"):
        EraseUnread({unread.name}).ensures(graph)
    EraseUnread({"_1"}).ensures(graph)  # which others read
    assert all(one.does for one in PASSES)
