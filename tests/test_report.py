"""Costs are those of the layer that is built, and reports say what the data says."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType
from torch import nn

from upcycle.cli import tables_of_reports as report
from upcycle.ir.ffn import FFN, Located, Miss, Projection
from upcycle.ir.measured import Check, LanguageModel, ModelDistance
from upcycle.ir.report import Report
from upcycle.ir.spec import MoESpec, Plan
from upcycle.layers.moe import MoE
from upcycle.passes.plan.costs import costs, layer_flops, layer_parameters, model_size
from upcycle.pointwise import Pointwise
from upcycle.recipe import schema as recipe
from upcycle.targets.destination import Destination
from upcycle.targets.runtimes.support import loads, refuses
from upcycle.util.wording import short


def ffn(path: str = "mlp", *, gated: bool = False, bias: bool = True) -> FFN:
    """16 -> 32 -> 16, plain ReLU or a gated product."""

    def projection(name: str) -> Projection:
        at = f"{path}.{name}"
        return Projection(at, f"{at}.weight", f"{at}.bias" if bias else None, False, (0, 32, 1))

    step = ("mul", ("z0", "z1"), {}) if gated else ("relu", ("z0",), {})
    names = ("gate", "up") if gated else ("up",)
    return FFN(
        path=path,
        kind="ffn",
        placement="module",
        expansions=tuple(map(projection, names)),
        contraction=projection("down"),
        pointwise=Pointwise(len(names), (step,), "relu"),
        d_model=16,
        d_ff=32,
        d_out=16,
    )


def spec(dense: FFN, **router: Any) -> MoESpec:
    """8 experts of 24 neurons, of which a token visits 2."""
    options = {"method": "normal", "top_k": 2, "weights": "renormalised"} | router
    return MoESpec(
        ffn=dense,
        experts=recipe.Experts(method="copy", count=8),
        router=recipe.Router(**options),
        compensate=recipe.Compensate(),
        shared=0,
        num_experts=8,
        width=24,
        top_k=2,
        scale=1.0,
        promise="exact",
        seed=0,
    )


def plan(*ffns: FFN, convert: int) -> Plan:
    chosen = recipe.Recipe(
        experts=recipe.Experts(method="copy", count=8),
        router=recipe.Router(method="normal", top_k=2, weights="renormalised"),
    )
    located = Located(ffns, (Miss("pool", "a softmax mixes the hidden axis"),))
    return Plan(located, tuple(spec(f) for f in ffns[:convert]), chosen, "sparse-upcycling")


def text(parts: list[RenderableType]) -> list[str]:
    buffer = io.StringIO()
    for part in parts:
        Console(file=buffer, width=200).print(part)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "router", [{}, {"bias": True}, {"method": "avg_key", "tied": True}], ids=["", "rbias", "tied"]
)
def test_parameters_are_those_of_the_layer(gated: bool, bias: bool, router: dict[str, Any]) -> None:
    planned = spec(ffn(gated=gated, bias=bias), **router)
    layer = MoE(planned.layer_config())
    assert layer_parameters(planned, 8) == sum(p.numel() for p in layer.parameters())
    expert = sum(p[0].numel() for p in layer.experts.parameters())
    assert layer_parameters(planned, 8) - layer_parameters(planned, 2) == 6 * expert


def test_costs_of_a_plan() -> None:
    planned = plan(ffn("a"), ffn("b"), convert=1)
    found = costs(planned, total_parameters=10_000, itemsize=4)
    dense = 2 * 16 * 32 + 32 + 16
    expert = 2 * 16 * 24 + 24
    moe = 8 * expert + 8 * 16 + 16
    assert found.parameters_after == 10_000 - dense + moe
    assert found.active_parameters == 10_000 - dense + moe - 6 * expert
    assert found.flops_before == 2 * (2 * 16 * 32)
    assert found.flops_after == 2 * (2 * (2 * 16 * 24) + 8 * 16) == layer_flops(planned.specs[0])
    assert found.bytes_before == 40_000
    assert found.bytes_on_disk == 4 * found.parameters_after
    assert found.peak_bytes == 4 * (10_000 + moe)


def test_the_dense_count_is_that_of_torch() -> None:
    """`FFN.num_parameters`, which costs subtract, against the modules that it stands for."""
    layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])
    assert ffn().num_parameters == sum(p.numel() for p in layers.parameters())


def written() -> Destination:
    runtimes = {"here": loads(), "near": loads("slowly"), "there": refuses("width", "too wide")}
    return Destination(None, "remote_code", {}, {"mixtral": "its router has no bias"}, runtimes)


def test_the_plan_report_says_what_becomes_of_each_ffn() -> None:
    planned = plan(*(ffn(f"layers.{i}.mlp") for i in range(6)), convert=4)
    lines = text(report.plan_report(planned, costs(planned, 1_234_567, 2), written()))
    becomes = "8 experts of 24, a token visits 2"
    assert lines[1].split("  ")[0] == "layers.{0..3}.mlp"
    assert becomes in lines[1]
    assert lines[2].startswith("layers.{4..5}.mlp")
    assert "stays dense" in lines[2]
    assert "sparse-upcycling converts 4 of 6 dense FFNs" in lines
    assert any(line.split() == ["parameters", "1.2M", "1.3M", "1.02"] for line in lines)
    end = next(i for i, line in enumerate(lines) if line.startswith("verdict: "))
    assert lines[end - 2].split(maxsplit=1) == ["pool", "a softmax mixes the hidden axis"]
    assert lines[end].startswith("verdict: exact by its algebra, not measured, with ")
    assert "`upcycle plan -v` says why it is no other architecture" in lines
    assert "not as mixtral: its router has no bias" not in lines
    start = lines.index("runtime  runs it")
    assert lines[start + 1 : start + 4] == [
        "here     yes",
        "near     yes: slowly",
        "there    no, width: too wide",
    ]


def test_a_verbose_plan_says_why_it_is_no_other_architecture() -> None:
    planned = plan(ffn("layers.0.mlp"), convert=1)
    lines = text(report.plan_report(planned, costs(planned, 1_234_567, 2), written(), verbose=True))
    assert "not as mixtral: its router has no bias" in lines
    assert not any("plan -v" in line for line in lines)


def test_the_plan_as_json() -> None:
    planned = plan(ffn("a"), ffn("b"), convert=1)
    data = report.plan_json(planned, costs(planned, 10_000, 4), written())
    assert json.loads(json.dumps(data)) == data
    assert [layer["path"] for layer in data["layers"]] == ["a"]
    assert data["dense"] == ["b"]
    assert data["promise"] == "exact"
    there = {"level": "no", "why": ["too wide"], "field": "width"}
    assert data["checkpoint"]["runtimes"]["there"] == there
    assert data["checkpoint"]["not_native_because"] == {"mixtral": "its router has no bias"}
    (miss,) = data["misses"]
    assert miss == {
        "path": "pool",
        "reason": "a softmax mixes the hidden axis",
        "node": "",
        "source": "",
    }


def test_a_plan_without_layers_has_a_report() -> None:
    planned = plan(ffn("a"), convert=0)
    estimate = costs(planned, 10_000, 4)
    assert "sparse-upcycling converts 0 of 1 dense FFN" in text(
        report.plan_report(planned, estimate, written())
    )
    assert report.plan_json(planned, estimate, written())["promise"] is None


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
        (["a.0.b", "a.2.b", "a.4.b"], ["a.{0,2..4}.b"]),
        (["a.2.b", "a.6.b"], ["a.{2,6}.b"]),
        (["a.0.b", "a.1.b", "a.5.b"], ["a.{0..1}.b", "a.5.b"]),
        (["a.0.b", "c.1.b"], ["a.0.b", "c.1.b"]),
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1"], ["a.0.{0..1}", "a.1.{0..1}"]),
        (["a", "a"], ["a", "a"]),
        (["x1.a", "x2.a"], ["x1.a", "x2.a"]),
        ([""], ["(root)"]),
    ],
)
def test_repeated_layers_are_one_row(paths: list[str], rows: list[str]) -> None:
    located = Located(tuple(ffn(path) for path in paths))
    lines = text(report.located_report(located))
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(rows)]] == rows


NOT_VERIFIED = Report("0", "model", "recipe", {}, "exact", "float32", "2")


def test_a_failed_check_stands_out() -> None:
    checks = (
        Check("layer, worst at a", error=1e-7, allowed=1e-5, passed=True),
        Check("model", error=0.5, allowed=1e-5, passed=False),
    )
    lines = text(report.verification_report(replace(NOT_VERIFIED, checks=checks)))
    assert lines[1].split()[-3:] == ["1.00e-07", "1.00e-05", "ok"]
    assert lines[2].split() == ["model", "5.00e-01", "1.00e-05", "FAILED"]
    assert lines[-1] == "2 checks: 1 failed"


def test_a_conversion_lists_its_files() -> None:
    sizes = {"model.safetensors": 12_345_678}
    lines = text(report.conversion_report(NOT_VERIFIED, "moe", sizes))
    assert lines[1].split() == ["model.safetensors", "12.3", "MB"]
    assert lines[2:5] == ["written to moe", "", "not verified"]
    assert lines[5] == "verdict: exact by its algebra, not measured"


def test_a_language_model_has_its_own_lines() -> None:
    found = LanguageModel(512, 0.0, 0.25, dense_perplexity=20.0, converted_perplexity=21.0)
    done = replace(NOT_VERIFIED, end_to_end=ModelDistance("text", {}, 0.0, found))
    lines = [line.split() for line in text(report.verification_report(done))]
    assert ["tokens", "512"] in lines
    assert ["top1", "agreement", "0.25"] in lines


def test_the_size_of_a_model_is_that_of_its_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert model_size(model) == (16, 4)
    model.config = SimpleNamespace(dtype=torch.bfloat16)
    assert model_size(model) == (16, 2)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (134_515_008, "134.5M"), (999_960, "1.0M")],
)
def test_short_numbers(number: int, expected: str) -> None:
    assert short(number) == expected
