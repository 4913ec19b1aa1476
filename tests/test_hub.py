"""Models of a hub, from a server of our own: what is asked for, what is kept, what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files
import hub_server
import pytest
import small_models
from click.testing import CliRunner, Result
from hub_server import Hub, commit
from huggingface_hub.utils import close_session

from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.models import hub as hub_models
from upcycle.models.named import open_model

RECIPE = ("--recipe", "sparse-upcycling", "--set", "experts.count=2")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with more beside it than a conversion needs, and other kinds of repositories."""
    root = tmp_path_factory.mktemp("hub")
    made = {name: root / name for name in ("llama", "old", "gguf", "two", "pickle", "none", "moe")}
    small_models.saved("llama", made["llama"], with_tokenizer=True)
    for name in ("modeling_evil.py", "pytorch_model.bin", "consolidated.00.pth", "model.onnx"):
        (made["llama"] / name).write_text("not to be fetched")
    (made["llama"] / "README.md").write_text("---\nlicense: mit\n---\n")
    small_models.build("llama", 1).save_pretrained(made["old"])
    for name, files in (("gguf", ["small.gguf"]), ("two", ["a.gguf", "b.gguf"])):
        made[name].mkdir()
        for file in files:
            gguf_files.write_gguf(small_models.build("llama"), made[name] / file)
    shutil.copytree(made["old"], made["pickle"])
    (made["pickle"] / "model.safetensors").rename(made["pickle"] / "pytorch_model.bin")
    made["none"].mkdir()
    (made["none"] / "README.md").write_text("nothing")
    shutil.copytree(made["old"], made["moe"])
    config = json.loads((made["moe"] / "config.json").read_text())
    (made["moe"] / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    return made


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repositories = {f"org/{name}": {"main": folder} for name, folder in folders.items()}
    repositories["org/llama"]["v1"] = folders["old"]
    repositories["org/gated"] = {"main": folders["llama"]}
    repositories["lonely"] = {"main": folders["old"]}
    with hub_server.serving(Hub(repositories, gated={"org/gated"})) as served:
        hub_server.use(served.url, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path / "made"))
        monkeypatch.chdir(tmp_path)
        yield served
        close_session()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(words: str, *arguments: object, code: int = 2) -> None:
    done = run(*arguments)
    assert done.exit_code == code, done.output
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]


def test_plan_and_inspect_take_no_weights(hub: Hub) -> None:
    for arguments in (("inspect", "org/llama"), ("plan", "org/llama", *RECIPE)):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    assert "config.json" in hub.downloads()
    assert hub.downloads(".safetensors") == []


@pytest.mark.usefixtures("measured_here")
def test_a_conversion_says_where_its_model_is(hub: Hub, folders: dict[str, Path]) -> None:
    """And `verify` and `bench` find it there again, also when the branch has moved on."""
    done = run("convert", "org/llama", *RECIPE, "--target", "safetensors", "--out", "moe")
    assert done.exit_code == 0, done.output
    assert "downloading org/llama, MB: 1 of 1" in done.stderr
    assert hub.downloads(".safetensors") == ["model.safetensors"]
    assert {"tokenizer.json", "README.md"} <= set(hub.downloads())
    for kind in (".py", ".bin", ".pth", ".onnx"):
        assert hub.downloads(kind) == [], kind
    report = json.loads(Path("moe/report.json").read_text())
    revision = commit(folders["llama"])
    assert report["model"] == "org/llama"
    assert report["source"] == {"hub": "org/llama", "revision": revision}
    assert "base_model: org/llama\n" in Path("moe/README.md").read_text()
    assert Path("moe/tokenizer.json").is_file()
    hub.repositories["org/llama"] = {"main": folders["old"], "first": folders["llama"]}
    checked = run("verify", "org/llama", "moe")
    assert checked.exit_code == 0, checked.output
    refused("", "verify", "org/llama@main", "moe", code=3)
    timed = run("bench", "moe", "--tokens", "1", "--seconds", "0.01", "--json")
    assert timed.exit_code == 0, timed.output
    assert "its weights" not in timed.stderr


def test_a_report_that_names_code_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    made = small_models.saved("llama", tmp_path / "dense")
    only = ("--target", "safetensors", "--no-verify")
    assert run("convert", made, *RECIPE, *only, "--out", "moe").exit_code == 0
    path = Path("moe/report.json")
    report = json.loads(path.read_text())
    for source in ({"hub": "os:getcwd", "revision": "x"}, {"hub": "org/llama", "revision": "a:b"}):
        path.write_text(json.dumps({**report, "source": source}))
        refused("does not say where that is", "bench", "moe")


@pytest.mark.parametrize(
    ("model", "words", "code"),
    [
        ("org/gated", "org/gated: a gated model: accept its terms on", 2),
        ("org/missing", "org/missing: there is no such directory, and no such model on", 2),
        ("org/llama@v9", "org/llama: it has no revision v9", 2),
        ("org/none", "org/none: it has no config.json", 2),
        ("org/two", "name one of them: org/two:a.gguf, org/two:b.gguf", 2),
        ("org/two:c.gguf", "org/two: there is no c.gguf; it has a.gguf, b.gguf", 2),
        ("org/llama:c.gguf", "it has no GGUF file", 2),
        ("org/llama:c", "org/llama:c: there is no such file or directory", 2),
        ("org/pickle", "org/pickle: its weights are pickle files", 2),
        ("org/moe", "it is already a mixture of experts", 4),
        ("minilm", "minilm: there is no such directory; did you mean sample:minilm?", 2),
        ("org/bad--name", "there is no such file or directory", 2),
    ],
)
def test_what_is_refused(model: str, words: str, code: int, hub: Hub) -> None:
    refused(words, "convert", model, *RECIPE, "--out", "out", code=code)
    assert not Path("out").exists()
    weights = (".safetensors", ".gguf", ".bin")
    assert [name for kind in weights for name in hub.downloads(kind)] == []


def test_a_wrong_recipe_costs_no_download(hub: Hub) -> None:
    wrong = ("--recipe", "emoe", "--set", "layers.include=nothing")
    assert run("convert", "org/llama", *wrong, "--out", "out").exit_code == 2
    assert hub.downloads(".safetensors") == []


def test_pickles_and_code_come_where_they_are_allowed(hub: Hub, folders: dict[str, Path]) -> None:
    source: Any = open_model("org/pickle", allow_pickle=True)
    source.fetched()
    assert hub.downloads(".bin") == ["pytorch_model.bin"]
    open_model("org/llama", trust_remote_code=True)
    assert hub.downloads(".py") == ["modeling_evil.py"]


def test_a_revision_is_another_model(hub: Hub, folders: dict[str, Path]) -> None:
    for name in ("org/llama@v1", f"org/llama@{commit(folders['old'])}", "lonely"):
        source: Any = open_model(name)
        assert source.hub.revision == commit(folders["old"])
        found = source.load().state_dict()["lm_head.weight"]
        assert found.equal(small_models.build("llama", 1).state_dict()["lm_head.weight"])
    assert open_model("org/llama@v1").label == "org/llama"


def test_a_directory_wins(hub: Hub, folders: dict[str, Path]) -> None:
    shutil.copytree(folders["old"], "org/llama")
    assert open_model("org/llama").directory == Path("org/llama")
    assert hub.asked == []


def test_a_gguf_file_of_a_hub(hub: Hub, folders: dict[str, Path]) -> None:
    for name in ("org/gguf", "org/gguf:small.gguf"):
        source: Any = open_model(name)
        revision = commit(folders["gguf"])
        assert source.hub.name == f"org/gguf@{revision}:small.gguf"
        assert open_model(source.hub.name).label == "org/gguf"
    expected = small_models.build("llama").state_dict()["lm_head.weight"]
    assert source.load().state_dict()["lm_head.weight"].equal(expected)
    assert hub.downloads(".gguf") == ["small.gguf"]


def test_without_a_network_the_cache_answers(
    hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("plan", "org/llama@v1", *RECIPE).exit_code == 0
    source: Any = open_model("org/llama").fetched()  # type: ignore[union-attr]
    asked = len(hub.asked)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the call and never answers
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for url, offline in ((hub.url, True), ("http://127.0.0.1:9", False), (silent_url, False)):
            close_session()
            hub_server.use(url, monkeypatch, tmp_path / "cache", offline=offline)
            why = "HF_HUB_OFFLINE is set" if offline else f"{url} does not answer"
            start = time.monotonic()
            again: Any = open_model("org/llama")
            assert again.fetched().directory == source.directory
            assert again.hub.revision == commit(folders["llama"])
            half: Any = open_model("org/llama@v1")
            with pytest.raises(UsageError, match="the hub cache lacks its weights"):
                half.fetched()
            with pytest.raises(UsageError, match="the hub cache does not have it") as caught:
                open_model("org/absent")
            assert why in str(caught.value)
            assert time.monotonic() - start < 3 * (hub_models.SECONDS + 1)
    assert len(hub.asked) == asked


def test_a_server_that_fails_is_named(hub: Hub) -> None:
    hub.broken.add("org/llama")
    refused("the hub answers with status 500; try again later", "plan", "org/llama", *RECIPE)


def test_the_road_of_a_user_with_environment_variables(hub: Hub, tmp_path: Path) -> None:
    """As a program of its own: convert, and plan again without a network."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

    def command(*arguments: str, offline: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "upcycle", *arguments],
            env={**environment, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stderr

    to_out = ("--target", "safetensors", "--no-verify", "--out", "out", "-q")
    assert command("convert", "org/llama", *RECIPE, *to_out, offline="0") == ""
    assert hub.downloads(".safetensors") == ["model.safetensors"]
    asked = len(hub.asked)
    command("convert", "org/llama", *RECIPE, *to_out, "--overwrite", offline="1")
    assert len(hub.asked) == asked
