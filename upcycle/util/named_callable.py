"""Objects that the user names as ``package.module:callable``."""

import importlib
import sys
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError, one_line


def call_named(name: str, kind: Any, wanted: str) -> Any:
    """What ``package.module:callable`` returns; modules of the working directory are found.

    Raises:
        UsageError: there is no such callable, it failed, or it returned something else than `kind`.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{name}: write it as package.module:callable")
    sys.path.insert(0, str(Path.cwd()))
    try:
        value = getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:
        raise UsageError(
            f"{name}: calling it failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(value, kind):
        raise UsageError(f"{name}: it returned {type(value).__name__}, not {wanted}")
    return value


def inputs_named(name: str | None) -> Any:
    """The example inputs that ``package.module:callable`` returns; None without a name."""
    return call_named(name, (dict, tuple), "a dict or a tuple of tensors") if name else None
