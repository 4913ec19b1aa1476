"""A plan, a conversion in memory and one piece by piece take and refuse the same checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from upcycle.cli.main import main

WAYS = ("--stream", "--no-stream")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def dense(llama: Path, tmp_path: Path) -> Path:
    """A llama directory that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "dense"))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def convert(model: Path, out: Path, *options: object, says: str = "-q") -> Result:
    start = ("convert", model, "--recipe", "sparse-upcycling", "--out", out)
    return command(*start, "--target", "safetensors", says, *options)


def change(dense: Path, edit: Callable[[Tensors], object]) -> None:
    path = dense / "model.safetensors"
    tensors = load_file(path)
    made = edit(tensors)
    save_file(made if isinstance(made, dict) else tensors, path, {"format": "pt"})


def retyped(name: str, dtype: str) -> Callable[[Path], None]:
    """One field of the header says another type, and the bytes stay."""

    def edit(dense: Path) -> None:
        path = dense / "model.safetensors"
        raw = path.read_bytes()
        old = f'"{name}":{{"dtype":"F32"'.encode()
        assert old in raw
        new = old.replace(b"F32", dtype.encode())
        assert len(new) == len(old)
        path.write_bytes(raw.replace(old, new))

    return edit


def other(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda dense: change(dense, edit)


def one(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return other(lambda tensors: tensors.update({name: value(tensors[name]).contiguous()}))


def prefixed(prefix: str) -> Callable[[Path], None]:
    return other(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def adapter(dense: Path) -> None:
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')


REFUSED = {
    "embedding": (one(EMBEDDING, lambda t: t[:99]), 2, EMBEDDING, "is [99, 32] in the file and ["),
    "norm": (one("model.norm.weight", lambda t: t[:17]), 2, "model.norm.weight", "is [17] in the"),
    "FFN": (one(UP, lambda t: t[:33]), 2, UP, "is [33, 32] in the file and [64, 32] by"),
    "int32": (retyped(UP, "I32"), 2, UP, "is stored as int32"),
    "uint32": (retyped("model.norm.weight", "U32"), 2, "model.norm.weight", "stored as uint32"),
    "float8": (one(UP, lambda t: t.to(torch.float8_e4m3fn)), 4, UP, "quantised"),
    "bool": (one(UP, lambda t: t > 0), 2, UP, "is stored as bool"),
    "compiled": (prefixed("_orig_mod."), 2, "begin with `_orig_mod.`, as torch.compile", ""),
    "parallel": (prefixed("module."), 2, "begin with `module.`, as DataParallel", ""),
    "PEFT": (prefixed("base_model.model."), 2, "begin with `base_model.model.`, as PEFT", ""),
    "adapter": (adapter, 4, "a PEFT adapter of my/base", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_ways_refuse_what_a_header_shows(name: str, dense: Path, tmp_path: Path) -> None:
    edit, code, *words = REFUSED[name]
    edit(dense)
    ways = [convert(dense, tmp_path / "out", way) for way in WAYS]
    for done in (command("plan", dense, "--recipe", "sparse-upcycling"), *ways):
        assert done.exit_code == code, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert ways[0].stderr == ways[1].stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, EMBEDDING, "model.norm.weight"])
def test_what_is_not_finite_is_named(name: str, value: float, dense: Path, tmp_path: Path) -> None:
    change(dense, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    for way in WAYS:
        done = convert(dense, tmp_path / "out", way)
        assert done.exit_code == 2
        assert f"{name} of the dense model has NaN or infinity in it" in done.stderr
        assert not (tmp_path / "out").exists()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.double()
    return found


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("way", WAYS)
def test_tensors_that_were_trained_apart_stay_apart(way: str, dense: Path, tmp_path: Path) -> None:
    """config.json says that they are one: the rule of transformers is that the files decide."""
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    change(dense, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * -0.5}))
    done = convert(dense, tmp_path / "out", way)
    assert done.exit_code == 0, done.stderr
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made[HEAD], -0.5 * made[EMBEDDING])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    # 2 layers of sums of at most 64 products, in another order.
    expected = logits(loaded(dense))
    bound = 2 * 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (logits(loaded(tmp_path / "out")) - expected).abs().max() <= bound
    # Equal ones are written once.
    change(dense, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert convert(dense, tmp_path / "tied", way).exit_code == 0
    assert HEAD not in load_file(tmp_path / "tied" / "model.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_tensors_that_nothing_reads_are_named(way: str, dense: Path, tmp_path: Path) -> None:
    more = {"v_head.weight": torch.ones(1, 32), "model.layers.7.mlp.up_proj.weight": torch.ones(2)}
    change(dense, lambda tensors: tensors.update(more))
    done = convert(dense, tmp_path / "out", way, says="-v")
    assert done.exit_code == 0, done.stderr
    assert f"nothing in the model reads them: {', '.join(sorted(more))}" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["unread"] == sorted(more)


@pytest.mark.parametrize("way", WAYS)
def test_an_index_needs_no_metadata(way: str, llama: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    loaded(llama).save_pretrained(dense, max_shard_size="20KB")
    index = dense / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    assert data.pop("metadata")
    index.write_text(json.dumps(data))
    done = convert(dense, tmp_path / "out", way)
    assert done.exit_code == 0, done.stderr


def test_files_without_safetensors_are_not_streamed(dense: Path, tmp_path: Path) -> None:
    path = dense / "model.safetensors"
    torch.save(load_file(path), dense / "pytorch_model.bin")
    path.unlink()
    done = convert(dense, tmp_path / "out", "--stream", "--allow-pickle")
    assert done.exit_code == 2
    assert "it has no safetensors files, which alone are read piece by piece" in done.stderr
    assert "--no-stream" in done.stderr


def test_a_source_with_another_tokenizer_is_refused(dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    tokenizer = small_models.tokenizer()
    tokenizer.save_pretrained(dense)
    given = ("--set", f"experts.sources=[base, {source}]", "--set", "experts.count=2")

    def merged(out: str) -> Result:
        start = ("convert", dense, "--recipe", "btx", "--out", tmp_path / out, *given)
        return command(*start, "--target", "safetensors", "--no-verify")

    tokenizer.save_pretrained(source)
    assert merged("same").exit_code == 0
    data = json.loads((source / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    size = len(vocabulary)
    data["model"]["vocab"] = {
        token: (i + 7) % size if i >= 5 else i for token, i in vocabulary.items()
    }
    (source / "tokenizer.json").write_text(json.dumps(data))
    refused = merged("other")
    assert refused.exit_code == 2
    assert "its tokenizer is another: token " in refused.stderr
