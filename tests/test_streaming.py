"""Converting piece by piece gives the same bytes as converting in memory, interrupted or not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from upcycle.cli.main import main
from upcycle.targets.files.finished_shards import MANIFEST

TINY = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300, "intermediate_size": 192}
SHARDS = ["--max-shard-size", "200kB"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**TINY, num_hidden_layers=3, num_key_value_heads=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(**TINY, num_hidden_layers=3)).save_pretrained(folder)
    return folder


def convert(model: Path, out: Path, *options: str) -> Result:
    arguments = ["convert", str(model), "--out", str(out), "--target", "safetensors", *options]
    return CliRunner().invoke(main, arguments)


def digests(folder: Path) -> dict[str, str]:
    """Of every file but those that say how it was verified."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in {"README.md", "report.html", "report.json"}
    }


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "granular", "split-all"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_bytes_are_those_of_a_conversion_in_memory(
    name: str, recipe: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    for out, how in (("whole", "--no-stream"), ("pieces", "--stream")):
        result = convert(model, tmp_path / out, "--recipe", recipe, how, *SHARDS)
        assert result.exit_code == 0, result.output
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1


def test_a_prefix_of_the_base_model_is_seen_through(bert: Path, tmp_path: Path) -> None:
    """The checkpoint of a masked language model, converted as the encoder in it."""
    torch.manual_seed(0)
    masked = tmp_path / "masked"
    BertForMaskedLM(BertConfig(**TINY, num_hidden_layers=2)).save_pretrained(masked)
    text = (masked / "config.json").read_text().replace("BertForMaskedLM", "BertModel")
    (masked / "config.json").write_text(text)
    # the pooler is not in it, so it is put there under the prefix
    tensors = load_file(masked / "model.safetensors")
    pooler = load_file(bert / "model.safetensors")
    tensors |= {f"bert.{n}": t for n, t in pooler.items() if n.startswith("pooler.")}
    save_file(tensors, masked / "model.safetensors", metadata={"format": "pt"})
    for out, how in (("whole", "--no-stream"), ("pieces", "--stream")):
        result = convert(masked, tmp_path / out, "--recipe", "sparse-upcycling", how)
        assert result.exit_code == 0, result.output
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


def killed(llama: Path, out: Path, after: int) -> None:
    """Run a conversion in a process that is killed -9 after writing some shards."""
    code = (
        "import os, signal, sys, upcycle.targets.files.finished_shards as m\n"
        "finished, count = m.Manifest.finished, [0]\n"
        "def stop(self, *args):\n"
        "    finished(self, *args)\n"
        "    count[0] += 1\n"
        f"    if count[0] == {after}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "m.Manifest.finished = stop\n"
        "from upcycle.cli.main import main; main(sys.argv[1:])"
    )
    arguments = ["convert", llama, "--recipe", "granular", "--out", out, "--stream"]
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--target", "safetensors", *SHARDS],
        capture_output=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize("after", [1, 4])
def test_kill_and_resume_give_the_same_bytes(llama: Path, tmp_path: Path, after: int) -> None:
    whole = convert(llama, tmp_path / "whole", "--recipe", "granular", "--stream", *SHARDS)
    assert whole.exit_code == 0, whole.output
    out = tmp_path / "out"
    killed(llama, out, after)
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert (partial / MANIFEST).is_file()
    first = sorted((partial / "new").glob("*.safetensors"))[0]
    written = first.stat().st_mtime_ns
    result = convert(llama, out, "--recipe", "granular", "--resume", *SHARDS)
    assert result.exit_code == 0, result.output
    assert not partial.exists()
    assert digests(out) == digests(tmp_path / "whole")
    assert (out / first.name).stat().st_mtime_ns == written, "a whole file was written again"


def test_a_damaged_file_is_written_again(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(llama, out, 3)
    first = sorted((tmp_path / "out.partial/new").glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    result = convert(llama, out, "--recipe", "granular", "--resume", *SHARDS)
    assert result.exit_code == 0, result.output
    whole = convert(llama, tmp_path / "whole", "--recipe", "granular", "--stream", *SHARDS)
    assert whole.exit_code == 0
    assert digests(out) == digests(tmp_path / "whole")


def test_the_rest_of_another_run_is_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(llama, out, 1)
    result = convert(llama, out, "--recipe", "sparse-upcycling", "--resume", *SHARDS)
    assert result.exit_code == 2
    assert "left from another conversion" in result.output
    assert not out.exists()
    kept = convert(llama, out, "--recipe", "granular", "--resume", *SHARDS)
    assert kept.exit_code == 0, kept.output


def test_the_result_loads(llama: Path, tmp_path: Path) -> None:
    result = convert(llama, tmp_path / "out", "--recipe", "sparse-upcycling", "--stream")
    assert result.exit_code == 0, result.output
    tokens = torch.arange(14).reshape(2, 7)
    dense = AutoModelForCausalLM.from_pretrained(llama).eval()
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert moe.config.model_type == "mixtral"
    with torch.no_grad():
        expected, actual = dense(tokens).logits.float(), moe(tokens).logits.float()
    # bfloat16: the products are summed in float32 and rounded once per linear map and layer
    bound = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound.item())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--target", "onnx"], "pass --target safetensors"),
        (["--dtype", "float32"], "leave --dtype and --device out"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    llama: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    result = convert(llama, tmp_path / "out", "--recipe", "granular", "--stream", *options)
    assert result.exit_code == 2
    assert sentence in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("available", "is_streamed"), [(10**10, False), (10**5, True)])
def test_what_does_not_fit_goes_piece_by_piece_and_the_page_cache_takes_no_room(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    is_streamed: bool,
) -> None:
    def sysconf(name: str) -> int:
        raise ValueError("unrecognized configuration name")  # on macOS, of SC_AVPHYS_PAGES

    monkeypatch.setattr(os, "sysconf", sysconf)
    figures = SimpleNamespace(free=0, available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: figures)
    result = convert(llama, tmp_path / "out", "--recipe", "granular")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert ("streamed" in report) == is_streamed


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_copies_that_are_all_chosen_are_no_split(llama: Path, tmp_path: Path, how: str) -> None:
    """With all experts at weight one, two copies are twice the FFN; only splits must be it."""
    options = ["--recipe", "sparse-upcycling", "--set", "experts.count=2", how]
    result = convert(llama, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "all experts" not in result.output
