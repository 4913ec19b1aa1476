"""Functions that remember tensors must not remember the fake ones of a capture."""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_CACHED = type(functools.lru_cache(len))


@contextlib.contextmanager
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
        is_own_class = isinstance(value, type) and value.__module__ == module
        for member in list(vars(value).values()) if is_own_class else (value,):
            _clear_one(member)


def _clear_one(value: Any) -> None:
    """Clear `value`, or the cached function that it wraps."""
    function = getattr(value, "__func__", value)
    if isinstance(function, _CACHED):
        function.cache_clear()
    elif isinstance(function, types.FunctionType):
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # the cell is not set yet
                if isinstance(cell.cell_contents, _CACHED):
                    cell.cell_contents.cache_clear()
