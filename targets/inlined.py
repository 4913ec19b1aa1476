"""The source text of routers and activations of others, for self-contained modeling files.

Their module is copied as those of upcycle are, so it has to be as plain: definitions, and imports
of torch, transformers, the standard library and what the file has of upcycle. Nothing is rewritten.
"""

import ast
import inspect
import sys
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch

from upcycle.errors import UnsupportedError

_PACKAGES = {"torch", "transformers", *sys.stdlib_module_names} - {"__future__"}
_TORCH: tuple[tuple[str, Any], ...] = (
    *(("torch", torch), ("torch.special", torch.special)),
    ("torch.nn.functional", torch.nn.functional),
)


def module_of(thing: Any, what: str, ours: Collection[str]) -> ModuleType:
    """The module of a class or a function of others, if its text can be copied.

    Args:
        thing: the class or function.
        what: what it is, for the message.
        ours: the modules of upcycle that the file has.

    Raises:
        UnsupportedError: it cannot; the message says why.
    """
    module = inspect.getmodule(thing)
    reason = "its source is not in a file" if module is None else _reason(module, thing, ours)
    if module is None or reason is not None:
        raise UnsupportedError(
            f"{what} cannot be copied into a self-contained modeling file: {reason}; define it in "
            "a module of its own that imports torch and upcycle.layers alone, and register it from "
            "another"
        )
    return module


def in_torch(function: Any) -> str | None:
    """How a file calls a function of torch, None for any other."""
    name = getattr(function, "__name__", "")
    return next((f"{p}.{name}" for p, m in _TORCH if getattr(m, name, None) is function), None)


def defined(module: ModuleType) -> set[str]:
    """The names that a module of definitions defines."""
    names: set[str] = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for name in targets if isinstance(name, ast.Name)}
    return names


def _reason(module: ModuleType, thing: Any, ours: Collection[str]) -> str | None:
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return "its source is not in a file"
    file = f"{module.__name__} "
    if getattr(module, getattr(thing, "__name__", ""), None) is not thing:
        return f"{file}does not have it under its name"
    if ast.get_docstring(tree) is None:
        return f"{file}has no docstring"
    for node in tree.body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if reason := _import_reason(node, ours):
                return f"{file}{reason}"
        elif not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign):
            return f"{file}does more than to define, in line {node.lineno}"
    return None


def _import_reason(node: ast.Import | ast.ImportFrom, ours: Collection[str]) -> str | None:
    if node.lineno != node.end_lineno:
        return f"has an import of several lines, in line {node.lineno}"
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        modules = ["." * node.level + (node.module or "")]
    for name in modules:
        if name.split(".")[0] in _PACKAGES:
            continue
        renamed = any(alias.asname or alias.name == "*" for alias in node.names)
        if isinstance(node, ast.Import) or name not in ours or renamed:
            return f"imports {name}, which the file cannot have"
    return None
