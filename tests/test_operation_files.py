"""``upcycle place`` and ``prune``, from directory to directory, and what their results tell."""

import json
from pathlib import Path
from typing import Any

import native_moes
import pytest
import small_models
import torch
from command_line import run

import upcycle
from upcycle.routing.contract import routed_layers
from upcycle.targets.provenance_file import read_origins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtures of experts of two forms, and one of experts that have a name; a text."""
    folder = tmp_path_factory.mktemp("operations")
    dense = small_models.saved("llama", folder / "llama", with_tokenizer=True)
    for seed, name in enumerate(("law", "code"), start=1):
        small_models.build("llama", seed=seed).save_pretrained(folder / name)
    bert = small_models.saved("bert", folder / "bert", with_tokenizer=True)
    loose = ("--set", "router.std=1", "--set", "verify.max_relative_error=99", "-q")
    sources = f"experts.sources=[base,{folder / 'law'},{folder / 'code'}]"
    for made_of, name, *recipe in (
        (dense, "moe", "drop-upcycling", "--set", "experts.count=4"),
        (bert, "own", "drop-upcycling", "--set", "experts.count=4"),
        (dense, "merged", "btx", "--set", "experts.count=3", "--set", sources),
    ):
        options = ("--target", "safetensors", "--out", folder / name)
        run("convert", made_of, "--recipe", *recipe, *loose, *options)
    (folder / "text.txt").write_text(" ".join("abcxyz" * 200))
    return folder


@pytest.mark.parametrize("name", ["moe", "own"])
def test_the_road_of_a_user(name: str, folder: Path, tmp_path: Path) -> None:
    """Trace, place, prune; each directory is one that the next command takes."""
    trace, data = tmp_path / "t.npz", ("--text", folder / "text.txt")
    for arguments in (
        ("trace", folder / name, *data, "--length", 16, "--out", trace),
        ("place", folder / name, "--trace", trace, "--devices", 2, "--out", tmp_path / "placed"),
        ("prune", tmp_path / "placed", "--keep", 3, *data, "--out", tmp_path / "pruned"),
        ("inspect", tmp_path / "pruned"),
    ):
        ended = run(*arguments)
        assert "shards" not in ended.stderr  # a progress bar of transformers among our lines
    plan = json.loads((tmp_path / "placed" / "placement.json").read_text())
    hops = plan["hops_per_token_and_layer"]
    assert hops["placed"] <= hops["contiguous"]
    for layer in plan["layers"].values():
        assert sorted(layer["was"]) == [0, 1, 2, 3]
        assert layer["devices"] == [[0, 1], [2, 3]]
    pruned: Any = upcycle.load(tmp_path / "pruned")
    assert {layer.num_experts for layer in routed_layers(pruned)} == {3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "DENSE", "--keep", "2", "--out", "OUT"], "it is a dense model"),
        (["prune", "MOE", "--keep", "1", "--out", "OUT"], "keep: 1: "),
        (["prune", "MOE", "--keep", "3", "--out", "MOE"], "it exists already"),
        (["place", "MOE", "--trace", "nowhere", "--devices", "2", "--out", "OUT"], "no trace"),
        (["place", "MOE", "--trace", "TRACE", "--devices", "3", "--out", "OUT"], "devices: 3"),
        (["place", "OWN", "--trace", "TRACE", "--devices", "2", "--out", "OUT"], "are others"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    places = {
        "DENSE": folder / "llama",
        "MOE": folder / "moe",
        "OWN": folder / "own",
        "OUT": tmp_path / "out",
        "TRACE": tmp_path / "t.npz",
    }
    if "TRACE" in arguments:
        text = ("--text", folder / "text.txt")
        run("trace", folder / "moe", *text, "--length", 16, "--out", tmp_path / "t.npz")
    result = run(*(places.get(argument, argument) for argument in arguments), code=None)
    assert result.exit_code in (2, 4), result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_sources_and_the_old_numbers_stay(folder: Path, tmp_path: Path) -> None:
    """Through two operations, by the names of the conversion."""
    placed, pruned = tmp_path / "placed", tmp_path / "pruned"
    text = ("--text", folder / "text.txt")
    trace = tmp_path / "t.npz"
    for count, name in ((3, "merged"), (4, "moe")):
        run("trace", folder / name, *text, "--length", 16, "--out", trace, "--overwrite")
        more = ("--devices", count, "--out", placed, "--overwrite")
        run("place", folder / name, "--trace", trace, *more)
        run("prune", placed, "--keep", 2, *text, "--out", pruned, "--overwrite")
        before, after = read_origins(folder / name), read_origins(pruned)
        assert before is not None
        assert after is not None
        weights = {at: upcycle.load(at) for at in (folder / name, pruned)}
        for old, new in zip(before, after, strict=True):
            assert new["layer"]["num_experts"] == len(new["was"]) == 2
            assert new["experts"] == [old["experts"][e] for e in new["was"]]
            stacks = [
                weights[at].get_submodule(old["path"]).experts.down_proj
                for at in (folder / name, pruned)
            ]
            assert torch.equal(stacks[1], stacks[0][new["was"]])
            if name == "merged":
                assert new["sources"] == [old["sources"][e] for e in new["was"]]
                assert len(set(new["sources"])) == 2
    told = run("inspect", pruned).stdout
    assert "Made from llama by drop-upcycling." in told
    assert "Then `upcycle place` of moe" in told
    assert "Then `upcycle prune` of placed (by norm, keep 2, on the given text)." in told
    assert "(was " in told


def test_the_report_of_the_model_before_is_not_that_of_the_result(
    folder: Path, tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned"
    run("prune", folder / "merged", "--keep", 2, "--out", pruned)
    assert not (pruned / "report.json").exists()
    run("report", pruned)
    page = (pruned / "report.html").read_text()
    assert "in the conversion they were" in page
    assert "from base" in page
    assert "checks held" not in page
    found = json.loads(run("report", pruned, "--json").stdout)
    assert found["history"]["operations"][0]["settings"]["keep"] == 2
    trained: Any = upcycle.load(folder / "own")
    trained.save_pretrained(tmp_path / "trained")
    run("report", tmp_path / "trained")
    page = (tmp_path / "trained" / "report.html").read_text()
    assert "There is no report.json here" in page
    assert "bert.encoder.layer.0" in page
    assert "upcycle inspect" in run("report", folder / "llama", code=2).stderr


def test_a_damaged_history_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    run("prune", folder / "own", "--keep", 3, "--out", tmp_path / "pruned")
    file = tmp_path / "pruned" / "operations.json"
    told = json.loads(file.read_text())
    for damage in ("{", "{}", json.dumps(told | {"operations": [{"name": 3}]})):
        file.write_text(damage)
        for command in ("inspect", "report"):
            said = run(command, tmp_path / "pruned", code=2).stderr
            assert said.count("\n") == 1
            assert "operations.json: not" in said


def test_layers_of_upcycle_lose_those_that_few_visit(folder: Path, tmp_path: Path) -> None:
    """As many as there are; a native architecture has one number for all."""
    text = ("--text", folder / "text.txt")
    for name in ("own", "moe"):
        out = tmp_path / name
        options = ("--by", "mass", "--below", 0.2, *text, "--out", out)
        found = json.loads(run("prune", folder / name, *options, "--json").stdout)
        kept = {
            path: max(2, sum(share >= 0.2 for share in shares))
            for path, shares in found["shares"].items()
        }
        counts = [layer.num_experts for layer in routed_layers(upcycle.load(out))]
        if name == "own":
            assert counts == [*kept.values()]
        else:
            assert counts == [max(kept.values())] * 2
        for path, shares in found["shares"].items():
            assert abs(sum(shares) - 1) < 1e-12
            left = [shares[e] for e in found["experts"][path]]
            assert min(left) >= max([s for s in shares if s not in left], default=0)
        assert "held out" in found["distance_on_data"]["inputs"]


def test_every_expert_has_a_row_with_its_share(folder: Path, tmp_path: Path) -> None:
    printed = run("prune", folder / "own", "--keep", 3, "--out", tmp_path / "out").stdout
    assert printed.count(" kept") == 6
    assert printed.count(" removed") == 2
    assert "Shares were counted on the documentation of Python" in printed
    native_moes.native("Mixtral", num_hidden_layers=4).save_pretrained(tmp_path / "many")
    folded = run("prune", tmp_path / "many", "--below", 0.1, "--out", tmp_path / "few").stdout
    assert "least share left" in folded
    assert " of 8: " in folded


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give one of --keep and --below"),
        (["--keep", "3", "--below", "0.1"], "give one of --keep and --below"),
        (["--below", "1"], "not in the range"),
        (["--keep", "3", "--text", "SHORT"], "give at least 800"),
    ],
)
def test_what_prune_cannot_do_is_one_sentence(
    options: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("a b c " * 50)
    given = [str(tmp_path / "short.txt") if part == "SHORT" else part for part in options]
    ended = run("prune", folder / "own", *given, "--out", tmp_path / "out", code=2)
    assert said in ended.stderr
    assert not (tmp_path / "out").exists()
