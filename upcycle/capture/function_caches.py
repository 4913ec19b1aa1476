"""Functions that remember tensors must not remember the fake ones of a capture."""

import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CACHED = type(functools.lru_cache(len))


@contextmanager
def caches_cleared(model: nn.Module) -> Iterator[None]:
    """Empty every ``functools.lru_cache`` of the model's own Python files afterwards."""
    try:
        yield
    finally:
        files = {base.__module__ for m in model.modules() for base in type(m).__mro__}
        for name in files:
            if not name.startswith("torch.") and name in sys.modules:
                _clear(vars(sys.modules[name]), name)


def _clear(names: dict[str, Any], module: str) -> None:
    for value in list(names.values()):
        if isinstance(value, type) and value.__module__ == module:
            for member in list(vars(value).values()):
                _clear_one(member)
        else:
            _clear_one(value)


def _clear_one(value: Any) -> None:
    """Clear `value`, or the cached function that it wraps."""
    function = getattr(value, "__func__", value)
    inner = function.__closure__ if isinstance(function, types.FunctionType) else None
    for found in (function, *(cell.cell_contents for cell in inner or () if _filled(cell))):
        if isinstance(found, _CACHED):
            found.cache_clear()


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not set yet
        return False
