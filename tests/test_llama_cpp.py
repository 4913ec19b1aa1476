"""llama.cpp runs what is written: its own converter makes a GGUF file, and the logits are equal.

The test needs the Python package ``llama-cpp-python`` and, in the environment variable
UPCYCLE_LLAMA_CPP, a checkout of llama.cpp: https://github.com/ggml-org/llama.cpp, or the folder
vendor/llama.cpp in the source distribution of llama-cpp-python.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
import transformers
from click.testing import CliRunner
from llama_case import EPS, ULPS, greedy, logits_of, opened
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from upcycle.cli.main import main
from upcycle.models import samples
from upcycle.models.sample_store import find

CHECKOUT = Path(os.environ.get("UPCYCLE_LLAMA_CPP", ""))
CONVERTER = CHECKOUT / "convert_hf_to_gguf.py"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not CONVERTER.is_file(), reason="UPCYCLE_LLAMA_CPP does not name a checkout of llama.cpp"
    ),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and bytes, in the form of Llama 2, which llama.cpp reads whatever its words are."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    words += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN")
    assert len(words) == 300
    word_of = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.BPE(word_of, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def converted(model: object, out: Path, *options: str) -> Path:
    done = CliRunner().invoke(
        main,
        ["convert", str(model), "--out", str(out), "--target", "safetensors", "-q", *options],
    )
    assert done.exit_code == 0, done.stderr
    return out


def gguf(directory: Path) -> Path:
    """What llama.cpp's own converter makes of a directory, in float32."""
    out = directory.with_suffix(".gguf")
    command = [CONVERTER, directory, "--outtype", "f32", "--outfile", out]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def read(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def errors(directory: Path, prompt: str) -> tuple[float, float]:
    """The largest difference of the logits of llama.cpp and transformers, and what is allowed."""
    ids = AutoTokenizer.from_pretrained(directory)(prompt).input_ids
    with torch.no_grad():
        theirs = read(directory)(torch.tensor([ids])).logits[0].numpy()
    difference = np.abs(logits_of(opened(gguf(directory)), ids) - theirs)
    return float(difference.max()), float(ULPS * EPS * np.abs(theirs).max())


LOOSE = ("--set", "verify.max_relative_error=10")
SPLIT = ("--recipe", "factorllm", "--set", "router.bias=false", *LOOSE)
RENORMALISED = ("--set", "router.weights=renormalised")
WITH_SHARED = (*SPLIT, "--set", "experts.shared=1")
CASES = {
    "copies": ("mixtral", "--recipe", "sparse-upcycling"),
    "slices of copies": ("mixtral", "--recipe", "granular"),
    "split": ("mixtral", *SPLIT, *RENORMALISED),
    "exact split": ("mixtral", "--recipe", "split-all", "--set", "experts.count=4"),
    "shared expert": ("granitemoeshared", *WITH_SHARED, *RENORMALISED),
}


@pytest.mark.parametrize("case", CASES)
def test_a_small_llama_runs(tmp_path: Path, case: str) -> None:
    """Logits, the tokens of the prompt and the greedy tokens after it are those of transformers."""
    architecture, *options = CASES[case]
    small_models.saved("llama", tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    out = converted(tmp_path / "dense", tmp_path / "moe", *options, "--runtime", "llama.cpp")
    assert json.loads((out / "config.json").read_text())["model_type"] == architecture
    error, allowed = errors(out, "hello World")
    assert error <= allowed
    llama = opened(out.with_suffix(".gguf"))
    ids = AutoTokenizer.from_pretrained(out)("hello World").input_ids
    assert llama.tokenize(b"hello World", add_bos=False) == ids
    written = read(out).generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    new = written[0, len(ids) :].tolist()
    assert greedy(llama, ids, len(new)) == new


needs_smollm2 = pytest.mark.skipif(
    find(samples.SAMPLES["smollm2"].package) is None, reason="run: upcycle samples add smollm2"
)


def with_known_words(model: Any, out: Path) -> Path:
    """A small model with the words of SmolLM2: llama.cpp wants to know the tokenizer of a Qwen."""
    model.eval().save_pretrained(out)
    AutoTokenizer.from_pretrained(samples.path("sample:smollm2")).save_pretrained(out)
    return out


def small_qwen3() -> Any:
    torch.manual_seed(0)
    config = {**small_models.DECODER, "vocab_size": 49152, "head_dim": 8}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))


def small_qwen2() -> Any:
    torch.manual_seed(0)
    config = {**small_models.DECODER, "vocab_size": 49152, "tie_word_embeddings": True}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))


@needs_smollm2
@pytest.mark.parametrize(
    ("model", "architecture", "options"),
    [
        (small_qwen3, "qwen3_moe", ("--recipe", "sparse-upcycling")),
        (small_qwen2, "qwen2_moe", (*WITH_SHARED, "--set", "router.weights=softmax")),
    ],
    ids=["qwen3_moe", "qwen2_moe"],
)
def test_small_qwens_run(
    tmp_path: Path, model: Any, architecture: str, options: tuple[str, ...]
) -> None:
    dense = with_known_words(model(), tmp_path / "dense")
    out = converted(dense, tmp_path / "moe", *options, "--runtime", "llama.cpp")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == architecture
    error, allowed = errors(out, "The capital of France is")
    assert error <= allowed


@needs_smollm2
def test_what_the_matrix_rules_out_computes_something_else(tmp_path: Path) -> None:
    """llama.cpp divides the weights of a Qwen3-MoE by their sum, though the file says not to."""
    dense = with_known_words(small_qwen3(), tmp_path / "dense")
    options = (*SPLIT, "--set", "router.weights=softmax", "--architecture", "qwen3_moe")
    refused = CliRunner().invoke(
        main, ["plan", str(dense), *options[:-2], "--runtime", "llama.cpp"]
    )
    assert "router.weights: its graph has weights `renormalised`" in refused.stderr
    error, allowed = errors(converted(dense, tmp_path / "moe", *options), "The capital of")
    assert error > 1000 * allowed


@needs_smollm2
@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "sparse-upcycling", "--set", "experts.count=3"),
        (*WITH_SHARED, *RENORMALISED),
    ],
    ids=["copies", "split"],
)
def test_smollm2_writes_the_same_text(tmp_path: Path, options: tuple[str, ...]) -> None:
    more = ("--no-verify", "--runtime", "llama.cpp")
    out = converted("sample:smollm2", tmp_path / "moe", *options, *more)
    prompt = "The capital of France is"
    tokenizer = AutoTokenizer.from_pretrained(out)
    given = tokenizer(prompt, return_tensors="pt").input_ids
    models = [out] if "factorllm" in options else [out, samples.path("sample:smollm2")]
    written = [
        read(model).generate(given, max_new_tokens=24, do_sample=False)[0, given.shape[1] :]
        for model in models
    ]
    llama = opened(gguf(out))
    for tokens in written:  # copies write what the dense model writes
        assert greedy(llama, given[0].tolist(), 24) == tokens.tolist()
    text = llama.create_completion(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith(text)
    assert len(text) > 20
