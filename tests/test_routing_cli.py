"""``upcycle trace``, ``generate`` and ``steer``, and what is shown of a trace."""

import json
from pathlib import Path
from typing import Any

import native_moes
import pytest
import small_models
import torch
from click.testing import CliRunner, Result

import upcycle
from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.routing.steering import Steering
from upcycle.routing.trace import Trace

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ran(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, a native one, and texts."""
    folder = tmp_path_factory.mktemp("routing")
    dense = small_models.saved("llama", folder / "llama", with_tokenizer=True)
    sets = ["experts.count=4", "router.std=1", "verify.max_relative_error=99"]
    options = [part for value in sets for part in ("--set", value)]
    target = ("--target", "safetensors", "--max-shard-size", "10KB")
    ran("convert", dense, "--recipe", "drop-upcycling", "--out", folder / "moe", *options, *target)
    native_moes.native("Qwen3Moe").save_pretrained(folder / "native")
    (folder / "a.txt").write_text(" ".join("abc" * 300))
    (folder / "z.txt").write_text(" ".join("xyz" * 300))
    (folder / "toward.txt").write_text("a b c\n\nb a c a\nc c b\n")
    (folder / "others.txt").write_text("x y z\nz y x x\n")
    return folder


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Path:
    texts = ("--text", folder / "a.txt", "--text", folder / "z.txt")
    out = folder / "t.npz"
    printed = ran("trace", folder / "moe", *texts, "--length", 16, "--out", out)
    assert "cv" in printed
    return out


def test_a_trace_has_the_tokens_and_their_classes(folder: Path, recorded: Path) -> None:
    trace = Trace.load(recorded)
    assert set(trace.classes) == {"a", "z"}
    assert trace.data == "the given text; the given text"
    assert trace.paths == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert len(trace.classes) == trace.sequence[0].max() + 1
    printed = ran("inspect", folder / "moe", "--trace", recorded)
    for word in (
        "dead_expert_frac",
        "counted on the given text",
        "tokens of a sequence more, a",
        "stays on its way",
    ):
        assert word in printed
    found = json.loads(ran("inspect", folder / "moe", "--trace", recorded, "--json"))
    assert sum(found["layers"][0]["load"]) == trace.index[0].size
    assert set(found["resonance"]) == {"a", "z"}


def test_a_native_directory_is_traced_on_tensors(folder: Path, tmp_path: Path) -> None:
    ids = {"input_ids": torch.randint(3, 90, (3, 8))}
    torch.save(ids, tmp_path / "ids.pt")
    out = tmp_path / "t.npz"
    data = ("--data", tmp_path / "ids.pt", "--allow-pickle")
    ran("trace", folder / "native", *data, "--out", out)
    assert len(Trace.load(out).index[0]) == 24
    assert "Several texts" in ran("inspect", folder / "native", "--trace", out)


def test_a_trace_of_another_model_is_refused(folder: Path, recorded: Path) -> None:
    result = run("inspect", folder / "native", "--trace", recorded)
    assert result.exit_code == 2
    assert "those of" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_page_shows_a_trace_that_lies_beside_the_model(folder: Path, recorded: Path) -> None:
    before = ran("report", folder / "moe")
    assert "Routing of traced tokens" not in (folder / "moe" / "report.html").read_text()
    beside = folder / "moe" / "trace.npz"
    beside.write_bytes(recorded.read_bytes())
    assert ran("report", folder / "moe") == before
    page = (folder / "moe" / "report.html").read_text()
    assert "Routing of traced tokens" in page
    assert "tokens of the given text; the given text that" in page
    assert "Chosen together in model.layers." in page
    assert "From model.layers.0.mlp to model.layers.1.mlp" in page
    beside.write_bytes(b"no trace")
    result = run("report", folder / "moe")
    beside.unlink()
    assert result.exit_code == 2
    assert "no trace" in result.stderr


def written(folder: Path, *options: object) -> list[str]:
    prompts = ("--prompt", "a b c", "--prompt", "x y z z z")
    text = ran("generate", folder, *prompts, "--max-new-tokens", 6, "--json", *options)
    return [one["text"] for one in json.loads(text)]


def test_text_is_written_with_every_routing(folder: Path) -> None:
    moe = folder / "moe"
    greedy = written(moe)
    assert greedy == written(moe)
    assert written(moe, "--contrast", "ranks=1+2") == greedy
    assert written(moe, "--contrast", "alpha=1") == greedy
    assert written(moe, "--contrast", "ranks=2,beta=0") == greedy
    for change in (("--k", 1), ("--suppress", "0:1", "--suppress", "model.layers.1.mlp:2")):
        assert len(written(moe, *change)) == 2
    drawn = ("--temperature", 5, "--seed", 3)
    assert written(moe, *drawn) == written(moe, *drawn) != greedy


def test_a_batch_is_written_as_each_prompt_alone(folder: Path) -> None:
    alone = ran("generate", folder / "moe", "--prompt", "a b c", "--max-new-tokens", 6, "--json")
    assert json.loads(alone)[0]["text"] == written(folder / "moe")[0]


def test_a_behaviour_is_found_and_steered(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "steer.json"
    sets = ("--toward", folder / "toward.txt", "--others", folder / "others.txt")
    ran("steer", folder / "moe", *sets, "--top", 2, "--about", "early letters", "--out", out)
    setting = Steering.load(out)
    assert len(setting.suppress) == 2
    assert setting.about == "early letters"
    steered = written(folder / "moe", "--steer", out)
    model: Any = upcycle.load(folder / "moe", steering=out)
    tokens = torch.randint(3, 90, (1, 6))
    with torch.no_grad(), upcycle.trace(model) as seen:
        by_load = model(input_ids=tokens).logits
    for layer, expert in setting.suppress:
        number = seen.result().paths.index(str(layer))
        assert not (seen.result().index[number] == expert).any()
    plain: Any = upcycle.load(folder / "moe")
    with torch.no_grad(), setting.on(plain):
        assert torch.equal(plain(input_ids=tokens).logits, by_load)
    with torch.no_grad():
        assert not torch.equal(plain(input_ids=tokens).logits, by_load)
    forced = tmp_path / "force.json"
    ran("steer", folder / "moe", *sets, "--top", 1, "--action", "force", "--out", forced)
    assert len(Steering.load(forced).force) == 1
    assert steered != written(folder / "moe") or written(folder / "moe", "--steer", forced)


def test_a_steered_model_stays_steered_when_it_is_copied(folder: Path) -> None:
    import copy

    model: Any = upcycle.load(folder / "moe")
    Steering(suppress=((0, 0), (0, 1))).attach(model)
    tokens = torch.randint(3, 90, (1, 6))
    with torch.no_grad(), upcycle.override(model, k=3):
        expected = model(input_ids=tokens).logits
    other = copy.deepcopy(model)
    with torch.no_grad(), upcycle.override(other, k=3), upcycle.trace(other) as seen:
        assert torch.equal(other(input_ids=tokens).logits, expected)
    assert not (seen.result().index[0] < 2)[seen.result().weights[0] > 0].any()


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"form": 2}',
        '{"form": 1, "suppress": [[0]]}',
        '{"form": 1, "force": [[0, "x"]]}',
        '{"form": 1, "call": "os.system"}',
    ],
)
def test_a_file_that_is_no_steering_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        Steering.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "MOE", "--prompt", "a", "--k", "9"], "k: 9: "),
        (["generate", "MOE", "--prompt", "a", "--suppress", "9:1"], "layer 9: "),
        (["generate", "MOE", "--prompt", "a", "--suppress", "one"], "no LAYER:EXPERT"),
        (["generate", "MOE", "--prompt", "a", "--contrast", "gamma=1"], "ranks, alpha, beta"),
        (["generate", "MOE", "--prompt", "a", "--contrast", "beta=x"], "is no number"),
        (["generate", "MOE", "--prompt", "a", "--contrast", "ranks=7"], "ranks: 7: "),
        (["generate", "NATIVE", "--prompt", "a"], "no tokenizer"),
        (["generate", "nowhere", "--prompt", "a"], "there is no such directory"),
        (["trace", "MOE", "--text", "nowhere.txt", "--out", "OUT"], "no such text file"),
        (["trace", "MOE", "--out", "THERE"], "it exists"),
        (["trace", "MOE", "--out", "nowhere/t.npz"], "there is no directory nowhere"),
        (
            ["steer", "MOE", "--toward", "A", "--others", "A", "--out", "OUT"],
            "no expert is visited",
        ),
        (
            ["steer", "MOE", "--toward", "A", "--others", "Z", "--top", "99", "--out", "OUT"],
            "top: 99: ",
        ),
        (["steer", "MOE", "--toward", "EMPTY", "--others", "A", "--out", "OUT"], "no prompt in it"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.npz").write_text("")
    (tmp_path / "empty.txt").write_text("\n\n")
    places = {
        "MOE": folder / "moe",
        "NATIVE": folder / "native",
        "OUT": tmp_path / "out",
        "THERE": tmp_path / "there.npz",
        "EMPTY": tmp_path / "empty.txt",
        "A": folder / "toward.txt",
        "Z": folder / "others.txt",
    }
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code in (2, 4), result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("sample:smollm2", "`upcycle convert sample:smollm2 --recipe NAME --out DIR` makes one"),
        ("org/name", "`hf download org/name --local-dir DIR` fetches one of the hub"),
        ("nowhere", "`upcycle convert MODEL --recipe NAME --out DIR` makes one"),
        ("llama", "it is a dense model, and this command wants a directory with a mixture"),
        ("moe/config.json", "and this is a file; give "),
    ],
)
def test_a_model_that_is_no_mixture_is_refused_with_what_to_do(
    named: str, said: str, folder: Path
) -> None:
    there = folder / named if (folder / named).exists() else named
    out = ("--out", folder / "none")
    prompts = ("--toward", folder / "toward.txt", "--others", folder / "others.txt")
    for command in (
        ("generate", there, "--prompt", "a"),
        ("trace", there, *out),
        ("steer", there, *prompts, *out),
        ("prune", there, "--keep", 2, *out),
        ("place", there, "--trace", folder / "t.npz", "--devices", 2, *out),
    ):
        ended = run(*command)
        assert ended.exit_code == 2, ended.output
        assert said in ended.stderr
        assert ended.stderr.count("\n") == 1
