"""llama.cpp runs what is written: its own converter makes a GGUF file, and the logits are equal.

The test needs the Python package ``llama-cpp-python`` and, in the environment variable
UPCYCLE_LLAMA_CPP, a checkout of llama.cpp: https://github.com/ggml-org/llama.cpp, or the folder
vendor/llama.cpp in the source distribution of llama-cpp-python.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from upcycle import samples
from upcycle.cli import main
from upcycle.sample_store import find

llama_cpp: Any = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python"
)
CHECKOUT = Path(os.environ.get("UPCYCLE_LLAMA_CPP", ""))
CONVERTER = CHECKOUT / "convert_hf_to_gguf.py"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not CONVERTER.is_file(), reason="UPCYCLE_LLAMA_CPP does not name a checkout of llama.cpp"
    ),
]

# A sum of n products errs by at most n eps of its largest term. On the way to a logit each of the 2
# layers sums 32 products four times for attention, 32 for gate and up and 64 for down, and the head
# 32. llama.cpp and transformers each round, so the two differ by twice that.
ULPS = 2 * (2 * (4 * 32 + 32 + 64) + 32)
EPS = torch.finfo(torch.float32).eps
F32 = 0  # the element type of the key-value cache, which is float16 by default


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


def opened(path: Path) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, type_k=F32, type_v=F32, n_threads=1
    )


def logits_of(llama: Any, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


def greedy(llama: Any, ids: list[int], count: int) -> list[int]:
    """`count` tokens after `ids`, each the one with the largest logit."""
    logits_of(llama, ids)
    made: list[int] = []
    for _ in range(count):
        made.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(made[-1:])
    return made


def both(directory: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The logits of llama.cpp and of transformers."""
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0].numpy()
    return logits_of(opened(gguf(directory)), ids), theirs


SPLIT = ("--recipe", "factorllm", "--set", "router.bias=false", "--set", "experts.count=4")
CASES = {
    "copies": ("--recipe", "sparse-upcycling"),
    "slices of copies": ("--recipe", "granular", "--set", "router.top_k=4"),
    "split": (*SPLIT, "--set", "router.weights=renormalised"),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_small_llama_runs(tmp_path: Path, options: tuple[str, ...]) -> None:
    small_models.saved("llama", tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    more = ("--set", "verify.max_relative_error=10", "--runtime", "llama.cpp")
    out = converted(tmp_path / "dense", tmp_path / "moe", *options, *more)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("hello World").input_ids
    ours, theirs = both(out, ids)
    assert np.abs(ours - theirs).max() <= ULPS * EPS * np.abs(theirs).max()
    llama = opened(out.with_suffix(".gguf"))
    assert llama.tokenize(b"hello World", add_bos=False) == ids
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    written = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    new = written[0, len(ids) :].tolist()
    assert greedy(llama, ids, len(new)) == new


@pytest.mark.skipif(
    find(samples.SAMPLES["smollm2"].package) is None, reason="run: upcycle samples add smollm2"
)
def test_smollm2_writes_the_same_text(tmp_path: Path) -> None:
    options = ("--recipe", "sparse-upcycling", "--set", "experts.count=3", "--no-verify")
    out = converted("sample:smollm2", tmp_path / "moe", *options, "--runtime", "llama.cpp")
    prompt = "The capital of France is"
    tokenizer = AutoTokenizer.from_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(samples.path("sample:smollm2"), dtype="float32")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = dense.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    llama = opened(gguf(out))
    found = llama.create_completion(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert found == tokenizer.decode(made, skip_special_tokens=True)
    assert found.startswith(" Paris.")
