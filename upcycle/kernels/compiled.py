"""The experts on the CPU as C++ that is compiled on the machine that runs them, at the first call.

`upcycle.kernels.library_file` compiles ``cpp/experts.cpp`` and keeps the library. Without a
compiler, or with ``UPCYCLE_COMPILE=0``, experts run on torch's products.

Shape suffixes: those of `upcycle.kernels`.
"""

import ctypes
import logging
import os
import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from upcycle.errors import UsageError, one_line
from upcycle.kernels.activations import NAMED_ACTIVATIONS
from upcycle.kernels.library_file import library_file

ACTIVATIONS = {row.name: row.kernel for row in NAMED_ACTIVATIONS if row.kernel is not None}
RULES = ("one", "renormalised", "softmax")  # as in cpp/routing.h
NO_EXPERT, EQUAL_SCORES, WRONG_SHAPE, NO_MEMORY = 1, 2, 3, 4  # as in cpp/experts.cpp
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_LENGTHS = ctypes.c_int64 * 8
_Experts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]
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

    `up_EGD` and the other parameters are float32 or bfloat16; with G = 2 I the gate comes first.
    `activation` is one of `ACTIVATIONS`, or None if it has no name. The rest is as in
    `upcycle.kernels.run_experts`.

    Raises:
        IndexError: an index of a pair with a weight is no expert.
        ValueError: the shapes do not fit together.
        MemoryError: there is none left.
    """
    experts = (up_EGD, up_bias_EG, down_EOI, down_bias_EO)
    if activation not in ACTIVATIONS or not _can_run(experts, (x_TD, weights_TK)):
        return None
    index, weights = _as(index_TK, torch.int64), _as(weights_TK, torch.float32)
    found = _call("experts", experts, activation, x_TD, index, weights, index.shape[1])
    if found is None:
        return None
    status, y_TO = found
    if status == NO_EXPERT:
        raise IndexError(f"an index of the chosen experts is not in [0, {len(up_EGD)})")
    if status == WRONG_SHAPE:
        given = (x_TD, index_TK, weights_TK, *experts)
        shapes = ", ".join(str(list(t.shape)) for t in given if t is not None)
        raise ValueError(f"tokens, index, weights and experts do not fit together: {shapes}")
    return y_TO


def run_routed(
    up_EGD: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_EOI: torch.Tensor,
    activation: str | None,
    x_TD: torch.Tensor,
    router: tuple[torch.Tensor, torch.Tensor | None, int, str, float],
    down_bias_EO: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """As `run_compiled`, with the visits that a linear router chooses in the same call.

    Scores are float32. None also where two scores are equal and torch has to choose between them,
    or where the shapes are wrong and torch says how.

    `router` is the weight [E, D] and the bias [E] or None, float32; how many are chosen; one of
    `RULES` for the weights; their scale.
    """
    weight_ED, bias_E, top_k, rule, scale = router
    experts = (up_EGD, up_bias_EG, down_EOI, down_bias_EO)
    if activation not in ACTIVATIONS or not _can_run(experts, (x_TD, weight_ED, bias_E)):
        return None
    # Torch rounds no tokens before it has their scores.
    if weight_ED.dtype != torch.float32 or x_TD.dtype != up_EGD.dtype:
        return None
    bias_E = None if bias_E is None else _as(bias_E, torch.float32)
    given = (weight_ED.contiguous(), bias_E, top_k, RULES.index(rule), scale)
    status, y_TO = _call("routed", experts, activation, x_TD, *given) or (EQUAL_SCORES, None)
    return None if status else y_TO


def _call(
    name: str,
    experts: _Experts,
    activation: str | None,
    x_TD: torch.Tensor,
    second: torch.Tensor,
    third: torch.Tensor | None,
    top_k: int,
    *rest: float,
) -> tuple[int, torch.Tensor] | None:
    """What the function returns, and [T, O]; None without a compiler.

    Raises:
        MemoryError: there is none left.
    """
    functions = library()
    if functions is None:
        return None
    up_EGD, _, down_EOI, _ = experts
    x = _as(x_TD, up_EGD.dtype)
    tokens, d_model = x.shape
    count, d_out, width = down_EOI.shape
    y_TO = torch.empty(tokens, d_out, dtype=torch.float32)
    tensors = (x, second, third, *experts, y_TO)
    sizes = (tokens, top_k, count, d_model, d_out, width)
    how = (up_EGD.shape[1] == 2 * width, ACTIVATIONS[activation or ""], torch.get_num_threads())
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    lengths = _LENGTHS(*[0 if tensor is None else tensor.numel() for tensor in tensors])
    status = functions[name, up_EGD.dtype](*pointers, lengths, *sizes, *how, *rest)
    if status == NO_MEMORY:
        raise MemoryError(f"no memory is left to run {tokens} tokens through experts")
    return status, y_TO if x_TD.dtype == torch.float32 else y_TO.to(x_TD.dtype)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, in that dtype. To ask takes an eighth of the time of a cast to the same."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _can_run(experts: _Experts, inputs: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether the tensors are plain and without gradients, and `experts` contiguous in one dtype.

    It is asked for each call, as parameters may be replaced at any time.
    """
    has_gradients = torch.is_grad_enabled()
    for tensor in (*experts, *inputs):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return False  # fake, distributed, ...
        if has_gradients and tensor.requires_grad:
            return False
    dtype = experts[0].dtype
    for tensor in experts:
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            return False
    if dtype == torch.float32:
        return True
    # Rows are read in words of 32 bits.
    return dtype == torch.bfloat16 and all(
        t is None or t.dim() < 3 or t.shape[2] % 2 == 0 for t in experts
    )


@lru_cache(maxsize=1)
def library() -> dict[tuple[str, torch.dtype], Callable[..., int]] | None:
    """The compiled functions, ``experts`` and ``routed`` for each dtype; None, and a warning in the
    log, where there are none."""
    if os.environ.get("UPCYCLE_COMPILE") == "0":
        return None
    try:
        with library_file() as path:
            return _functions(ctypes.CDLL(str(path)))
    # Whatever keeps the library from being there, torch can compute the same.
    except (OSError, AttributeError, subprocess.TimeoutExpired, UsageError) as error:
        why = one_line(error)
        _log.warning("experts run on torch's products, which is slower: %s", why)
        return None


def _functions(loaded: ctypes.CDLL) -> dict[tuple[str, torch.dtype], Callable[..., int]]:
    functions = {}
    types: list[Any] = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 6 + [ctypes.c_int] * 3
    for dtype, suffix in _NAMES.items():
        for name, more in (("experts", []), ("routed", [ctypes.c_int, ctypes.c_float])):
            function = getattr(loaded, f"upcycle_{name}_{suffix}")
            function.argtypes, function.restype = types + more, ctypes.c_int
            functions[name, dtype] = function
    return functions
