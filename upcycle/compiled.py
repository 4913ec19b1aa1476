"""The experts on the CPU as C++ that is compiled on the machine that runs them, at the first call.

`CXX`, or the first of ``c++``, ``g++`` and ``clang++``, compiles ``cpp/experts.cpp`` for this
machine in about two seconds; the library is kept in the user's cache directory.
Without a compiler, or with ``UPCYCLE_COMPILE=0``, experts run on torch's products.

Shape suffixes: T tokens, D d_model, O d_out, E experts, K chosen experts, I expert width,
G = arity * I.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from upcycle.cache_home import cache_directory

SOURCE = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
ACTIVATIONS = ("none", "relu", "relu2", "silu", "gelu", "gelu_tanh")  # as in cpp/activations.h
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_log = logging.getLogger(__name__)


def run_compiled(
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    down_bias_EO: torch.Tensor | None,
    activation: str | None,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor | None:
    """What the chosen experts of each token add, weighted; None where this cannot compute it.

    Every sum is in float32; with bfloat16 experts, tokens and the hidden layer are rounded to it.
    The result does not depend on the number of threads. Pairs of weight zero cost nothing, and
    their index is not looked at.

    Args:
        up_EGD: float32 or bfloat16; with G = 2 I the gate comes first.
        up_bias_EG: of the same dtype, or None.
        down_EOI: of the same dtype.
        down_bias_EO: of the same dtype, or None.
        activation: one of `ACTIVATIONS`, or None if it has no name.
        x_TD: tokens, float.
        index_TK: integers.
        weights_TK: float.

    Returns:
        [T, O], in the dtype of `x_TD`.

    Raises:
        IndexError: an index of a pair with a weight is no expert.
    """
    given = (up_EGD, down_EOI, up_bias_EG, down_bias_EO)
    tensors = [tensor for tensor in given if tensor is not None]
    if activation is None or not _can_run(tensors, (x_TD, weights_TK)):
        return None
    functions = library()
    if functions is None:
        return None
    dtype = up_EGD.dtype
    x = x_TD.to(dtype).contiguous()
    index = index_TK.long().contiguous()
    weights = weights_TK.to(torch.float32).contiguous()
    experts, d_out, width = down_EOI.shape
    y_TO = torch.empty(len(x), d_out, dtype=torch.float32)
    status = functions[dtype](
        *(tensor.data_ptr() for tensor in (x, index, weights)),
        up_EGD.data_ptr(),
        None if up_bias_EG is None else up_bias_EG.data_ptr(),
        down_EOI.data_ptr(),
        None if down_bias_EO is None else down_bias_EO.data_ptr(),
        y_TO.data_ptr(),
        *(*index.shape, experts, up_EGD.shape[2], d_out, width),
        up_EGD.shape[1] == 2 * width,
        ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )
    if status:
        raise IndexError(f"an index of the chosen experts is not in [0, {experts})")
    return y_TO.to(x_TD.dtype)


def _can_run(tensors: list[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> bool:
    dtype = tensors[0].dtype
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in (*tensors, *inputs)):
        return False  # fake, distributed, ...
    if dtype not in _NAMES or any(not t.is_contiguous() or t.dtype != dtype for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *inputs)):
        return False
    # Rows are read in words of 32 bits.
    return all(t.shape[2] * t.element_size() % 4 == 0 for t in tensors[:2])


@lru_cache(maxsize=1)
def library() -> dict[torch.dtype, Callable[..., int]] | None:
    """The compiled function for each dtype; None, with a line in the log, if there is none."""
    if os.environ.get("UPCYCLE_COMPILE") == "0":
        return None
    try:
        path = build()
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("experts run on torch's products, which is slower: %s", reason)
        return None
    functions = {}
    for dtype, name in _NAMES.items():
        function = getattr(loaded, f"upcycle_experts_{name}")
        function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 6 + [ctypes.c_int] * 3
        function.restype = ctypes.c_int
        functions[dtype] = function
    return functions


def build() -> Path:
    """Compile the library, unless this compiler has done so for such a machine; its path.

    Raises:
        OSError: no compiler, or the folder cannot be written.
        subprocess.CalledProcessError: the compiler refuses the source.
    """
    names = filter(None, (os.environ.get("CXX"), *COMPILERS))
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found; install g++ 12 or clang++, or set CXX")
    # What `native` means here: a home directory may be shared by machines.
    macros = _run(compiler, *FLAGS[:3], "-dM", "-E", "-x", "c++", os.devnull)
    sources = [file.read_text() for file in sorted(SOURCE.iterdir())]
    key = hashlib.sha256("\0".join([macros, *FLAGS, *sources]).encode()).hexdigest()[:16]
    cache = cache_directory()
    path = cache / f"experts-{key}.so"
    if not path.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # others may compile it, too
            made = Path(folder) / path.name
            _run(compiler, *FLAGS, str(SOURCE / "experts.cpp"), "-o", str(made))
            made.replace(path)
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
