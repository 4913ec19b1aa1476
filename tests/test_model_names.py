"""What MODEL can be besides a directory: files, near names; and the names of dtypes and devices."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import small_models
import torch
from click.testing import CliRunner, Result

import upcycle
from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.models.load_options import SHORT, device_named, dtype_named
from upcycle.models.named import open_model
from upcycle.util.untrusted import names_code

RECIPE = ("--recipe", "sparse-upcycling", "--set", "experts.count=2")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path / "made"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_gguf_file_is_the_model_that_it_was_made_of() -> None:
    model = small_models.build("llama")
    gguf_files.write_gguf(model, Path("small.gguf"))
    assert run("plan", "small.gguf", *RECIPE).exit_code == 0
    assert not any(Path("made").rglob("*.safetensors"))  # a plan unpacks no weights
    done = run("convert", "small.gguf", *RECIPE, "--target", "safetensors", "--out", "moe")
    assert done.exit_code == 0, done.output
    assert "unpacking small.gguf" in done.stderr
    assert "Converting" not in done.stderr  # the bars of transformers
    assert json.loads(Path("moe/report.json").read_text())["model"] == "small.gguf"
    assert Path("moe/tokenizer.json").is_file()
    assert run("verify", "small.gguf", "moe").exit_code == 0
    source: Any = open_model(".") if Path("moe").rename("elsewhere") else None  # the one in it
    for name, tensor in source.load().state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.gguf", "transformers cannot read this GGUF file"),
        ("other.gguf", "not a GGUF file"),
        ("x-00001-of-00002.gguf", "one part of a model that was split"),
        ("folder", "name one of them: folder/a.gguf, folder/b.gguf"),
        ("no.gguf", "no.gguf: there is no such file or directory"),
    ],
)
def test_gguf_files_that_are_refused(name: str, words: str) -> None:
    whole = gguf_files.write_gguf(small_models.build("llama"), Path("whole.gguf")).read_bytes()
    Path("cut.gguf").write_bytes(whole[:4000])
    Path("other.gguf").write_bytes(b"something else")
    Path("x-00001-of-00002.gguf").write_bytes(whole)
    Path("folder").mkdir()
    for file in "ab":
        Path(f"folder/{file}.gguf").write_bytes(whole)
    done = run("plan", name, *RECIPE)
    assert done.exit_code in (2, 4), done.output
    assert words in done.stderr.splitlines()[-1]
    assert not any(Path("made").glob("models/*"))


def test_what_lies_beside_a_gguf_file_has_no_say() -> None:
    gguf_files.write_gguf(small_models.build("llama"), Path("small.gguf"))
    Path("adapter_config.json").write_text('{"base_model_name_or_path": "evil"}')
    Path("tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    assert open_model("small.gguf").label == "small.gguf"


def test_a_file_of_a_directory_means_the_directory() -> None:
    small_models.build("llama").save_pretrained("dense")
    small_models.build("llama").save_pretrained("sharded", max_shard_size="40KB")
    shards = sorted(path.name for path in Path("sharded").glob("model-*"))
    names = ["dense/model.safetensors", "dense/config.json", f"sharded/{shards[0]}"]
    names += ["sharded/model.safetensors.index.json"]
    for name in names:
        source: Any = open_model(name)
        assert (source.directory, source.label) == (Path(name).parent, Path(name).parent.name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dense/extra.safetensors", "no model directory names it"),
        ("alone/model.safetensors", "put config.json beside it"),
        ("dense/model.pt", "a pickle file says no configuration"),
        ("dense/model.bin", "--allow-pickle"),
        ("dense/notes.txt", "not a model; MODEL is"),
        ("dence", "did you mean dense?"),
        ("./dence", "there is no such file or directory; did you mean dense?"),
        ("minilm", "did you mean sample:minilm?"),
        ("bert_tiny", "did you mean sample:bert-tiny?"),
        ("some-model", "the hub cache does not have it, and HF_HUB_OFFLINE is set"),
        ("a/b/c", "there is no such file or directory"),
    ],
)
def test_names_that_are_refused(name: str, words: str) -> None:
    small_models.build("llama").save_pretrained("dense")
    Path("alone").mkdir()
    shutil.copy("dense/model.safetensors", "alone")
    for file in ("extra.safetensors", "model.pt", "model.bin", "notes.txt"):
        Path("dense", file).write_text("x")
    done = run("plan", name, *RECIPE)
    assert done.exit_code == 2, done.output
    assert words in done.stderr.splitlines()[-1]


def test_a_gguf_name_is_no_python_code() -> None:
    assert names_code("package.module:callable")
    assert not names_code("org/name:file.gguf")
    with pytest.raises(UsageError, match="module: there is no such directory"):
        open_model("module:file.gguf")


def test_short_names_of_dtypes() -> None:
    assert {dtype_named(name) for name in ("bf16", "bfloat16", "BF16")} == {torch.bfloat16}
    assert {dtype_named(name) for name in ("fp16", "half")} == {torch.float16}
    assert {dtype_named(name) for name in ("fp32", "float32")} == {torch.float32}
    assert all(dtype_named(name) for name in SHORT)
    assert dtype_named(None) is None
    with pytest.raises(UsageError, match="choose one of float64, float32, bfloat16, float16"):
        dtype_named("int8")


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda *a, device: tried.append(device))
    names = ("cpu", None, "gpu", "gpu:1", "cuda:1", "mps")
    assert [device_named(n) for n in names] == ["cpu", "cpu", "cuda", "cuda:1", "cuda:1", "mps"]
    assert tried == ["cuda", "cuda:1", "cuda:1", "mps"]
    for wrong in ("meta", "tpu", "cuda:x", "ve"):
        with pytest.raises(UsageError, match="choose cpu, cuda or gpu, cuda:1, mps or auto"):
            device_named(wrong)


def test_a_short_dtype_on_the_command_line() -> None:
    small_models.build("llama").save_pretrained("dense")
    to = ("--target", "safetensors", "--no-verify", "--out", "moe")
    assert run("convert", "dense", *RECIPE, *to, "--dtype", "bf16").exit_code == 0
    assert json.loads(Path("moe/report.json").read_text())["dtype"] == "bfloat16"
    done = run("convert", "dense", *RECIPE, *to, "--dtype", "bf17", "--overwrite")
    assert "--dtype bf17: unknown; choose one of" in done.stderr


def test_a_place_that_holds_no_files_is_refused() -> None:
    small_models.build("llama").save_pretrained("dense")
    done = run("convert", "dense", *RECIPE, "--out", "/proc/moe")
    assert done.exit_code == 2
    assert "/proc is no place for files; choose another --out" in done.stderr


def test_python_takes_names_too() -> None:
    model = small_models.build("llama")
    model.save_pretrained("dense")
    for name in ("dense", Path("dense")):
        done = upcycle.convert(name, "sparse-upcycling", overrides=["experts.count=2"])
        assert done.report.model == "dense"
        assert done.report.end_to_end is not None
    Path("model.onnx").write_text("")
    with pytest.raises(UsageError, match="the command line alone"):
        upcycle.convert("model.onnx", "sparse-upcycling")


def test_files_that_the_models_of_a_hub_cache_share(tmp_path: Path) -> None:
    """A blob may be a link into the blobs of the whole cache, if that has its mark."""
    small_models.build("llama").save_pretrained("dense")
    shared, blobs = tmp_path / "hub/blobs", tmp_path / "hub/models--a/blobs"
    snapshot = tmp_path / "hub/models--a/snapshots/0f"
    for folder in (shared, blobs, snapshot):
        folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(f"dense/{file}", shared / file)
        (blobs / file).symlink_to(shared / file)
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    with pytest.raises(UsageError, match="a link that leads out"):
        open_model(str(snapshot))
    (shared / ".huggingface-shared-blobs").write_text("1")
    open_model(str(snapshot)).load()  # type: ignore[union-attr]
