"""Each tier of the verification can fail, and says where."""

import copy
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli import tables_of_reports as report
from upcycle.cli.main import main
from upcycle.conversion.api import Conversion, convert
from upcycle.errors import VerificationError
from upcycle.ir.measured import LayerDistance
from upcycle.ir.report import Report
from upcycle.ir.rounding import ROUNDING
from upcycle.layers.experts import Experts
from upcycle.layers.moe import MoE
from upcycle.layers.router import Router
from upcycle.targets.checkpoint import planned_layers
from upcycle.targets.onnx.export import export_onnx
from upcycle.util.json_text import json_text
from upcycle.util.modules import eval_mode
from upcycle.verification.checks import RELOADED, check, raise_if_failed
from upcycle.verification.distinct_experts import distinct_experts_error


def converted(name: str, recipe: str, *overrides: str) -> Conversion:
    return convert(small_models.build(name), recipe, overrides=overrides)


def layer_checks(done: Conversion) -> dict[str, bool]:
    """The layer checks of a conversion as it is now: the first word of each, and if it passed."""
    checks = verified_again(done).checks[:-1]  # without the end to end one
    return {c.what.partition(",")[0]: c.passed for c in checks}


def verified_again(done: Conversion) -> Report:
    return done.opened.verify_module(replace(done.measured, checks=()), done.made)


def layers_of(done: Conversion) -> list[MoE]:
    return [layer for _, layer in planned_layers(done.model, done.plan)]


BLANK = Report("0", "model", "recipe", {}, "exact", "float32", "2")
ROWS = "weights changed in conversion"
LAYER, DISTINCT = "layer", "routing of tokens to experts"
ALL = "layer with all experts active"


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "granular", "split-all", "moefication"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_right_conversion_passes(name: str, recipe: str) -> None:
    done = converted(name, recipe)
    assert all(layer_checks(done).values())
    assert all(row.untraced_rows == 0 for row in done.report.layers)


@pytest.mark.parametrize("matrix", ["up", "down"])
def test_t0_counts_a_changed_row(matrix: str) -> None:
    done = converted("llama", "granular")
    layer = layers_of(done)[1]
    with torch.no_grad():
        if matrix == "up":
            layer.experts.up_EGD[2, 3, 5] *= 1 + 1e-5
        else:
            layer.experts.down_proj[2, 5, 3] *= 1 + 1e-5
    again = verified_again(done)
    assert [row.untraced_rows for row in again.layers or ()] == [0, 1]
    assert again.checks[0].error == 1
    assert not again.checks[0].passed


def test_t0_sees_a_row_that_is_no_number() -> None:
    done = converted("llama", "sparse-upcycling")
    with torch.no_grad():
        layers_of(done)[0].experts.down_proj[1, 0, 7] = math.nan
    assert not layer_checks(done)[ROWS]


def test_t1_sees_swapped_experts() -> None:
    done = converted("bert", "split-all")
    down = layers_of(done)[0].experts.down_proj
    with torch.no_grad():
        down[[0, 1]] = down[[1, 0]]
    found = layer_checks(done)
    assert not found[ROWS]
    assert not found[LAYER]
    assert not found[ALL]


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "split-all"])
def test_t1_sees_an_output_bias_added_for_each_expert(recipe: str) -> None:
    done = converted("bert", recipe)
    with torch.no_grad():
        layer = layers_of(done)[0]
        bias = layer.experts.down_bias_EO if recipe == "sparse-upcycling" else layer.output_bias
        assert bias is not None
        bias.fill_(0.5)
    assert not layer_checks(done)[LAYER]


def first_two(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A layer that always runs experts 0 and 1, which copies cannot tell from a right one."""

    def broken(self: Experts, x: torch.Tensor, index: torch.Tensor, w: torch.Tensor) -> Any:
        return run(self, x, torch.arange(index.shape[1]).expand_as(index), w)

    return broken


def wrong_order(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A layer that mixes up the weights of the chosen experts."""

    def broken(self: Experts, x: torch.Tensor, index: torch.Tensor, w: torch.Tensor) -> Any:
        return run(self, x, index, w.flip(-1))

    return broken


@pytest.mark.parametrize("breakage", [first_two, wrong_order])
def test_t1_sees_a_combine_that_copies_cannot_see(
    breakage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = converted("llama", "sparse-upcycling")
    monkeypatch.setattr(Experts, "forward", breakage(Experts.forward))
    found = layer_checks(done)
    assert found[LAYER], "copies are equal, so this must not notice it"
    assert not found[DISTINCT]
    with pytest.raises(VerificationError, match="routing of tokens to experts"):
        convert(small_models.build("llama"), "sparse-upcycling")


def test_t1_sees_a_router_that_does_not_take_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Router.forward

    def broken(self: Router, x: torch.Tensor) -> Any:
        logits, weights, index = route(self, x)
        return logits, weights, (index + 1) % logits.shape[-1]

    done = converted("llama", "sparse-upcycling")
    monkeypatch.setattr(Router, "forward", broken)
    (layer, _) = layers_of(done)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert distinct_experts_error(layer, x) == math.inf


@pytest.mark.parametrize("weights", ["renormalised", "softmax", "one", "renorm_detach"])
@pytest.mark.parametrize("bias", ["true", "false"])
def test_the_distinct_reference_knows_every_weight_rule(weights: str, bias: str) -> None:
    """With the layer's own float64 path: any difference of formulas would show."""
    done = convert(
        small_models.build("bert").double(),
        "sparse-upcycling",
        verify=False,
        overrides=[f"router.weights={weights}", f"router.bias={bias}", "router.scale=0.7"],
    )
    layer = layers_of(done)[0].eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).double()
    assert distinct_experts_error(layer, x) < ROUNDING[torch.float64]
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


def test_t2_a_budget_that_is_exceeded() -> None:
    with pytest.raises(VerificationError, match=r"end to end: error .* furthest off"):
        converted("bert", "moefication", "verify.max_relative_error=0.001")


@pytest.mark.parametrize("change", ["zeros", "nan", "swap"])
def test_t3_sees_a_file_that_is_not_the_model(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = converted("bert", "split-all")

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        name = next(n for n in tensors if n.endswith("experts.down_proj"))
        if change == "swap":
            tensors[name] = tensors[name].flip(0).contiguous()
        else:
            tensors[name].fill_(0 if change == "zeros" else math.nan)
        save_file(tensors, path, {"format": "pt"})

    load = upcycle.load

    def load_damaged(directory: Path, model: Any = None, **options: Any) -> Any:
        damage(directory)
        return load(directory, model, **options)

    monkeypatch.setattr("upcycle.verification.files.load", load_damaged)
    with pytest.raises(VerificationError, match="files loaded again"):
        done.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_t4_sees_a_graph_that_is_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = converted("bert", "split-all")

    def export_other(model: Any, *args: Any, **options: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.cls.predictions.bias.add_(0.5)
        return export_onnx(other, *args, **options)

    monkeypatch.setattr("upcycle.targets.onnx.write.export_onnx", export_other)
    with pytest.raises(VerificationError, match="ONNX Runtime against PyTorch"):
        done.save(tmp_path / "out", targets=["safetensors", "onnx"])
    assert list(tmp_path.iterdir()) == []


def test_a_check_with_an_error_that_is_no_number_fails() -> None:
    for error in (math.nan, math.inf):
        found = check(RELOADED, error, 1.0)
        assert not found.passed
        report = replace(BLANK, checks=(found,))
        with pytest.raises(VerificationError):
            raise_if_failed(report)
    again = Report.from_json(json.loads(json_text(report.to_json())), "it")
    assert again.checks[0].error == math.inf  # which JSON does not have


def test_outputs_that_are_no_numbers_fail() -> None:
    dense = small_models.build("bert")
    other: Any = copy.deepcopy(dense)
    with torch.no_grad():
        other.cls.predictions.bias[3] = math.nan
    assert upcycle.verify(dense, dense).relative == 0
    assert upcycle.verify(dense, other).relative == math.inf
    assert upcycle.verify(other, other).relative == math.inf


def test_verify_leaves_the_modes_as_they_are() -> None:
    dense = small_models.build("bert")
    other = small_models.build("bert", seed=1).train()
    other.bert.embeddings.eval()
    before = [m.training for m in other.modules()]
    found = upcycle.verify(dense, other)
    assert found.relative > 0.01
    assert [m.training for m in other.modules()] == before
    assert not any(m.training for m in dense.modules())


def test_modes_are_restored_after_a_failure() -> None:
    model = small_models.build("bert").train()

    def fail() -> None:
        with eval_mode(model):
            assert not model.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(m.training for m in model.modules())


def test_a_conversion_leaves_the_mode_of_the_dense_model() -> None:
    dense = small_models.build("bert").train()
    dense.bert.embeddings.eval()
    before = [m.training for m in dense.modules()]
    done = convert(dense, "sparse-upcycling")
    assert [m.training for m in dense.modules()] == before
    assert done.model.training


def test_the_report_says_where_the_largest_error_is() -> None:
    found = converted("llama", "moefication").report.to_json()
    worst = max(found["layers"], key=lambda row: row["relative"])
    expected = {"layer": worst["path"], "relative": worst["relative"]}
    assert found["largest_error_at"] == expected


def run(*args: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_the_verify_command(tmp_path: Path) -> None:
    dense = small_models.saved("llama", tmp_path / "dense", with_tokenizer=True)
    out = tmp_path / "moe"
    done = run("convert", dense, "--recipe", "granular", "--out", out)
    assert done.exit_code == 0, done.stderr

    passed = run("verify", dense, out, "--json")
    assert passed.exit_code == 0, passed.stderr
    found = json.loads(passed.stdout)
    assert [c["what"].partition(",")[0] for c in found["checks"]] == [
        ROWS,
        LAYER,
        DISTINCT,
        "end to end",
        "ONNX Runtime against PyTorch",
    ]
    assert all(c["passed"] for c in found["checks"])
    assert found["end_to_end"]["language_model"]["top1_agreement"] > 0.99
    assert "5 checks: all within what the recipe allows" in run("verify", dense, out).stdout

    small_models.build("llama", seed=1).save_pretrained(tmp_path / "other")
    small_models.tokenizer().save_pretrained(tmp_path / "other")
    failed = run("verify", tmp_path / "other", out)
    assert failed.exit_code == 3
    assert "FAILED" in failed.stdout
    assert f"error: verification failed: {ROWS}: error 512, allowed 0" in failed.stderr

    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-9])
    damaged = run("verify", dense, broken)
    assert damaged.exit_code == 2
    assert "not a whole safetensors file" in damaged.stderr


@pytest.mark.parametrize(
    ("name", "recipe", "expert"),
    [
        ("llama", "sparse-upcycling", "model.layers.1.block_sparse_moe.experts.1.w2.weight"),
        ("llama", "moefication", "model.layers.1.mlp.experts.down_proj"),
        ("bert", "split-all", "bert.encoder.layer.1.output.dense.experts.down_proj"),
    ],
    ids=["native", "self-contained", "self-contained, tapped"],
)
def test_the_verify_command_reads_the_layers_in_the_files(
    name: str, recipe: str, expert: str, tmp_path: Path
) -> None:
    dense, out = small_models.saved(name, tmp_path / "dense"), tmp_path / "moe"
    options = ("--target", "safetensors")
    done = run("convert", dense, "--recipe", recipe, "--out", out, *options)
    assert done.exit_code == 0, done.stderr
    passed = run("verify", dense, out, "--json")
    assert passed.exit_code == 0, passed.stderr
    rows = json.loads(passed.stdout)["layers"]
    before = json.loads((out / "report.json").read_text())["layers"]
    assert not any("inputs" in row for row in (*rows, *before))  # on the tokens that they get
    for row, was in zip(rows, before, strict=True):
        assert row["tokens_per_expert"] == was["tokens_per_expert"]
        # An exact layer differs by rounding alone, and the tokens by that of the layers before it.
        assert abs(row["relative"] - was["relative"]) <= ROUNDING[torch.float32]
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[expert].view(-1)[3] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    failed = run("verify", dense, out)
    assert failed.exit_code == 3
    assert f"verification failed: {ROWS}: error 1, allowed 0" in failed.stderr


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("report.json", lambda d: d.update(dtype="float7"), "not a report of upcycle, dtype"),
        ("report.json", lambda d: d.update(resolved_recipe={"x": 1}), "resolved_recipe."),
        ("provenance.json", lambda d: d["layers"][0].pop("dense_neurons"), "dense_neurons"),
        ("provenance.json", lambda d: d["layers"][0].update(experts=["x-y"]), "and other rows"),
    ],
)
def test_verify_says_what_is_damaged(
    file: str, damage: Callable[[Any], object], words: str, tmp_path: Path
) -> None:
    dense, out = small_models.saved("bert", tmp_path / "dense"), tmp_path / "moe"
    options = ("--target", "safetensors", "--no-verify")
    assert run("convert", dense, "--recipe", "split-all", "--out", out, *options).exit_code == 0
    data = json.loads((out / file).read_text())
    damage(data)
    (out / file).write_text(json.dumps(data))
    failed = run("verify", dense, out)
    assert failed.exit_code == 2
    assert words in failed.stderr
    assert "bug" not in failed.stderr


def test_verify_loads_the_dense_model_as_the_conversion_did(tmp_path: Path) -> None:
    dense = small_models.saved("bert", tmp_path / "dense")
    out = tmp_path / "moe"
    options = ("--target", "safetensors", "--dtype", "bfloat16")
    assert run("convert", dense, "--recipe", "split-all", "--out", out, *options).exit_code == 0
    checked = run("verify", dense, out, "--json")
    assert checked.exit_code == 0
    assert json.loads(checked.stdout)["checks"][-1]["allowed"] == ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("count", [2, 40])
def test_many_layers_are_shown_by_their_error(count: int) -> None:
    rows = tuple(
        LayerDistance(
            *(1.0, i / 100, 0.0, 0.5, 0.75),
            path=f"layers.{i}.mlp",
            promise="exact",
            tokens_per_expert=(1,),
            distinct_experts_relative=0.0,
        )
        for i in range(count)
    )
    buffer = io.StringIO()
    for part in report.verification_report(replace(BLANK, layers=rows)):
        Console(file=buffer, width=200).print(part)
    lines = [line.split() for line in buffer.getvalue().splitlines()]
    assert [f"layers.{count - 1}.mlp", f"{(count - 1) / 100:.2e}", "0.500000", "0.750000"] in lines
    assert (["28", "layers", "with", "smaller", "errors", "in", "report.json"] in lines) is (
        count == 40
    )
    assert any(line[:1] == ["layers.0.mlp"] for line in lines) is (count == 2)
