"""What a file says is data: nothing it names runs, nothing outside its directory is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli.main import main
from upcycle.errors import UpcycleError, UsageError
from upcycle.util.untrusted import inside, printable

RUNS = "from pathlib import Path\nPath('ran').touch()\ndef run(): Path('ran').touch()\n"


def command(*arguments: object, answer: str = "") -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=answer)


def convert(model: object, out: Path, *options: object, **more: str) -> Result:
    start = ("convert", model, "--recipe", "sparse-upcycling", "--out", out)
    return command(*start, "--target", "safetensors", "-q", *options, **more)


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The working directory is above the files, so that modules in them would be found."""
    monkeypatch.chdir(tmp_path)
    return lambda: not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense and converted models, which tests copy."""
    root = tmp_path_factory.mktemp("folders")
    found = {name: small_models.saved(name, root / name) for name in ("llama", "bert")}
    for name, dense in list(found.items()):
        found[f"{name} moe"] = root / f"{name}-moe"
        assert convert(dense, found[f"{name} moe"], "--no-verify").exit_code == 0
    return found


def copied(directory: Path, name: str) -> Path:
    return Path(shutil.copytree(directory, name))


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bench_does_not_run_what_a_report_names(
    folders: dict[str, Path], nothing_ran: Callable[[], bool]
) -> None:
    moe = copied(folders["llama moe"], "conv")
    (moe / "evil.py").write_text(RUNS)
    edited(moe / "report.json", model="conv.evil:run")
    done = command("bench", moe, "--seconds", 0, "--tokens", 1)
    assert (done.exit_code, nothing_ran()) == (2, True)
    assert "name the dense model with --against" in done.stderr


@pytest.mark.parametrize("how", ["verify", "bench", "load"])
def test_code_of_a_converted_model_runs_with_the_flag_alone(
    how: str, folders: dict[str, Path], nothing_ran: Callable[[], bool]
) -> None:
    """A type of upcycle is built by upcycle itself; another one would be built by the file."""
    moe = copied(folders["bert moe"], "conv")
    with (moe / "modeling_upcycle.py").open("a") as file:
        file.write("\n" + RUNS)
    assert upcycle.load(moe).config.model_type == "upcycle_bert"
    assert nothing_ran()
    edited(moe / "config.json", model_type="upcycle_own_bert")
    if how == "load":
        with pytest.raises(UsageError, match="pass `trust_remote_code=True`"):
            upcycle.load(moe)
    else:
        dense = folders["bert"]
        given = (dense, moe) if how == "verify" else (moe, "--against", dense)
        done = command(how, *given)
        assert done.exit_code == 2
        assert "pass --trust-remote-code if you have read it" in done.stderr
    assert nothing_ran()


RECIPE = """version: 1
experts: {method: from_checkpoints, count: 2, merge: mean, sources: [SOURCES]}
router: {method: normal, std: 0.02, top_k: 2, weights: renormalised}
"""


def test_a_recipe_file_names_no_code(
    tmp_path: Path, nothing_ran: Callable[[], bool], folders: dict[str, Path]
) -> None:
    (tmp_path / "pk").mkdir()
    (tmp_path / "pk" / "evil.py").write_text(RUNS)
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(RECIPE.replace("SOURCES", "base, 'pk.evil:run'"))
    arguments = (folders["llama"], "--recipe", recipe)
    for done in (command("convert", *arguments, "--out", "o"), command("plan", *arguments)):
        assert (done.exit_code, nothing_ran()) == (2, True)
        assert f"error: {recipe}:2:76: experts.sources.1: `pk.evil:run` is Python" in done.stderr
        assert "--set experts.sources=[...]" in done.stderr


def test_code_that_the_command_line_names_is_called(tmp_path: Path) -> None:
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(RECIPE.replace("SOURCES", "base, base"))
    named = "experts.sources=[base, small_models:plain]"
    done = convert("small_models:plain", tmp_path / "o", "--recipe", recipe, "--set", named)
    assert done.exit_code == 0, done.stderr
    # The report names it now, and a report is a file.
    refused = command("verify", "small_models:plain", "o")
    assert refused.exit_code == 2
    assert "give all of --source in their order" in refused.stderr
    given = ("--source", "base", "--source", "small_models:plain")
    verified = command("verify", "small_models:plain", "o", *given)
    assert verified.exit_code == 0, verified.stderr


TOKENIZER = (
    RUNS
    + """
from transformers import PreTrainedTokenizerFast

class Mine(PreTrainedTokenizerFast):
    pass
"""
)


def test_a_tokenizer_asks_nothing_and_runs_with_the_flag_alone(
    folders: dict[str, Path], tmp_path: Path, nothing_ran: Callable[[], bool]
) -> None:
    dense = copied(folders["llama"], "dense")
    (dense / "mine.py").write_text(TOKENIZER)
    small_models.tokenizer().save_pretrained(dense)
    code = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    edited(dense / "tokenizer_config.json", auto_map=code, tokenizer_class="Mine")
    refused = convert(dense, tmp_path / "o", answer="yes\nyes\n")
    assert (refused.exit_code, nothing_ran()) == (2, True), refused.stderr
    assert "its tokenizer brings its own Python code; pass --trust-remote-code" in refused.stderr
    done = convert(dense, tmp_path / "o", "--trust-remote-code")
    assert done.exit_code == 0, done.stderr
    assert not nothing_ran()
    assert (tmp_path / "o" / "mine.py").is_file()


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "__doc__", "AutoTokenizer", "a.b"])
def test_only_model_classes_are_built(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    dense = copied(folders["llama"], "dense")
    edited(dense / "config.json", architectures=[name])
    done = convert(dense, tmp_path / "o")
    assert done.exit_code == 4
    assert f"the architecture {name} is not part of transformers" in done.stderr
    moe = copied(folders["llama moe"], "moe")
    edited(moe / "config.json", architectures=[name])
    with pytest.raises(UsageError, match="has no model class"):
        upcycle.load(moe)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", 5),
        ("architectures", [5]),
        ("dtype", "load"),
        ("dtype", []),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("auto_map", ["x"]),
    ],
)
def test_damaged_fields_are_named(
    field: str, value: object, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("llama", "llama moe"):
        model = copied(folders[name], name.replace(" ", "-"))
        edited(model / "config.json", **{field: value})
    done = convert("llama", tmp_path / "o")
    assert done.exit_code == 2
    assert f"config.json: its field {field} is damaged" in done.stderr
    with pytest.raises(UpcycleError, match=f"its field {field} is damaged"):
        upcycle.load("llama-moe")


def test_code_of_the_source_is_not_in_a_native_output(
    folders: dict[str, Path], tmp_path: Path, nothing_ran: Callable[[], bool]
) -> None:
    dense = copied(folders["llama"], "dense")
    (dense / "evil.py").write_text(RUNS)
    edited(dense / "config.json", auto_map={"AutoModelForCausalLM": "evil.run"})
    assert convert(dense, tmp_path / "o").exit_code == 0
    assert "auto_map" not in (tmp_path / "o" / "config.json").read_text()
    assert not (tmp_path / "o" / "evil.py").exists()
    assert nothing_ran()


def test_the_weights_that_the_configuration_names_are_read_by_all_ways(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    dense = copied(folders["llama"], "dense")
    tensors = load_file(dense / "model.safetensors")
    other = {name: t * 2 if name == "lm_head.weight" else t for name, t in tensors.items()}
    save_file(other, dense / "other.safetensors", {"format": "pt"})
    edited(dense / "config.json", transformers_weights="other.safetensors")
    for how in ("--stream", "--no-stream"):
        done = convert(dense, tmp_path / how, how)
        assert done.exit_code == 0, done.stderr
        made = load_file(tmp_path / how / "model.safetensors")
        assert torch.equal(made["lm_head.weight"], 2 * tensors["lm_head.weight"])
    (tmp_path / "outside.safetensors").write_bytes((dense / "other.safetensors").read_bytes())
    edited(dense / "config.json", transformers_weights="../outside.safetensors")
    for how in ("--stream", "--no-stream"):
        done = convert(dense, tmp_path / "o", how)
        assert done.exit_code == 2
        assert "config.json: it names '../outside.safetensors', which is not in" in done.stderr


def test_weights_are_no_link_out_of_their_directory(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    dense = copied(folders["llama"], "dense")
    (dense / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (dense / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    done = convert(dense, tmp_path / "o")
    assert done.exit_code == 2
    assert "model.safetensors: a link that leads out of its directory" in done.stderr


def test_names_with_braces_and_escapes_are_shown_harmlessly(tmp_path: Path) -> None:
    names = ("a.{", "a.\u00b2", "a.{0:>2000000000}.1", "a.\x1b[31mred", f"a.{'9' * 5000}")
    for name in names:
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
        save_file({name: torch.ones(2)}, tmp_path / "one" / "model.safetensors")
        save_file({"b": torch.ones(2)}, tmp_path / "two" / "model.safetensors")
        done = command("diff", "one", "two")
        assert done.exit_code == 3, done.stderr
        assert printable(name)[:40] in done.stdout
        assert "\x1b" not in done.output
        assert (
            json.loads(command("diff", "one", "two", "--json").stdout)["only_a"][0]["name"] == name
        )


def test_control_characters_become_escapes() -> None:
    assert printable("plain text \u00e9 \n\t") == "plain text \u00e9 \n\t"
    assert printable("\x1b]0;title\x07 \u202etxt.exe \r") == "\\x1b]0;title\\x07 \\u202etxt.exe \\r"


@pytest.mark.parametrize("name", ["..", "a/../..", "/etc/passwd", "", "a\0b", "..\\x", "out"])
def test_names_that_lead_out(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "out").symlink_to(tmp_path)
    with pytest.raises(UsageError):
        inside(home, name, "x.json")
    assert inside(home, "a/b", "x.json") == home / "a" / "b"
