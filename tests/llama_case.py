"""llama.cpp in this process, through the Python package llama-cpp-python."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from upcycle.util.installed import installed_version

if installed_version("llama-cpp-python") is None:  # a module of its name says nothing
    pytest.skip(
        "llama-cpp-python is not installed: pip install llama-cpp-python", allow_module_level=True
    )
llama_cpp: Any = importlib.import_module("llama_cpp")

# A sum of n products errs by at most n eps of its largest term. On the way to a logit each of the 2
# layers sums 32 products four times for attention, 32 for gate and up and 64 for down, and the head
# 32. llama.cpp and transformers each round, so the two differ by twice that.
ULPS = 2 * (2 * (4 * 32 + 32 + 64) + 32)
EPS = torch.finfo(torch.float32).eps
F32 = 0  # the element type of the key-value cache, which is float16 by default


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
