"""Two model directories, dense or converted: which configuration and which tensors differ."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle.models.checkpoint_tensors import read_tensors
from upcycle.util.json_text import read_json

CONFIGS = ("config.json", "upcycle.json")
AT_A_TIME = 2**22  # elements in float64


def difference(a: Path, b: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Compare two directories, of Hugging Face or of upcycle, as plain data.

    One tensor of each is read at a time. Equal means equal bytes, so NaN equals NaN and 0 does not
    equal -0. ``max`` is the largest absolute difference, ``relative`` that over the largest value
    of `a`; both are None for tensors of different shapes.

    Raises:
        UsageError: one has no weights, or a file is damaged.
    """
    before, after = (read_tensors(d, allow_pickle=allow_pickle) for d in (a, b))
    both = [name for name in before if name in after]
    changed = [row for name in both if (row := _tensor(name, before[name], after[name]))]
    only_a = [_named(n, before[n]) for n in before if n not in after]
    only_b = [_named(n, after[n]) for n in after if n not in before]
    config = list(_fields(_config(a), _config(b)))
    return {
        "a": str(a),
        "b": str(b),
        "equal": not (config or changed or only_a or only_b),
        "config": config,
        "equal_tensors": len(both) - len(changed),
        "different_tensors": changed,
        "only_a": only_a,
        "only_b": only_b,
    }


def _named(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor)}


def _tensor(name: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, Any] | None:
    """What differs between two tensors, or None."""
    row: dict[str, Any] = {"name": name, "max": None, "relative": None}
    row |= {"shapes": [list(a.shape), list(b.shape)], "dtypes": [_dtype(a), _dtype(b)]}
    if a.shape != b.shape:
        return row
    if a.dtype == b.dtype and _same_bytes(a, b):
        return None
    largest, reference = 0.0, 0.0
    for x, y in zip(*(torch.split(t.reshape(-1), AT_A_TIME) for t in (a, b)), strict=True):
        largest = _largest(largest, x.double() - y.double())
        reference = _largest(reference, x.double())
    relative = largest / reference if reference else math.inf
    return row | {"max": largest, "relative": 0.0 if largest == 0 else relative}


def _largest(before: float, tensor: torch.Tensor) -> float:
    """The larger of `before` and the values; NaN if there is one."""
    here = tensor.abs().max().item() if tensor.numel() else 0.0
    return here if math.isnan(here) or here > before else before


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(directory: Path) -> dict[str, Any]:
    for name in CONFIGS:
        path = directory / name
        if path.is_file():
            return read_json(path)
    return {}


def _fields(a: Any, b: Any, name: str = "") -> Iterator[dict[str, Any]]:
    """The fields that differ, by their dotted names; an absent one is null."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            yield from _fields(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield {"field": name, "a": a, "b": b}
