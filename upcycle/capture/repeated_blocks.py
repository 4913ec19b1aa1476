"""When do two blocks compute the same, except for the numbers in their weights?

The structure of a block is everything that decides what its forward does: the types and the
attributes of its modules, functions and nested objects included, the shapes of its weights, and
what it shares with the rest of the model. What is not understood is compared by identity, so two
blocks count as equal only if they are.
"""

import enum
import functools
import re
import types
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

# Attributes that hold the position of a block. Every other number must agree.
_INDEX = re.compile(r"(^|_)(idx|index|layer_?id|block_?id|layer_?num(ber)?|depth)$")
_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, type(None))


def repeated_blocks(model: nn.Module) -> dict[str, Hashable]:
    """Path of each block of a ModuleList or Sequential -> its list and its structure.

    Blocks are children that have children of their own.
    """
    uses: Counter[int] = Counter(_used(model))
    blocks: dict[str, Hashable] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        for name, child in module.named_children():
            if next(child.children(), None) is not None:
                index = int(name) if name.isdigit() else None
                prefix = f"{path}.{name}" if path else name
                blocks[prefix] = (path, _Describer(child, index, uses).block())
    return blocks


def _used(module: nn.Module) -> list[int]:
    """The id of every module and tensor at each place where it is registered below `module`."""
    found: list[int] = []
    for _, inner in module.named_modules(remove_duplicate=False):
        tensors = [*inner._parameters.values(), *inner._buffers.values()]
        found += [id(inner), *(id(tensor) for tensor in tensors if tensor is not None)]
    return found


class _Describer:
    """Turns one block into nested tuples that are equal for equal structures."""

    def __init__(self, block: nn.Module, index: int | None, uses: Counter[int]) -> None:
        self._block = block
        self._index = index
        self._uses = uses
        self._used_here = Counter(_used(block))
        self._names = {id(module): name for name, module in block.named_modules()}
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()

    def block(self) -> Hashable:
        """The structure of the block."""
        return tuple(
            (name, id(type(module)), self._shared(module), self._module(module))
            for name, module in self._block.named_modules(remove_duplicate=False)
        )

    def _shared(self, thing: object) -> Hashable:
        """What is used outside the block, too, by identity; what is used twice in it, by number."""
        key = id(thing)
        if self._uses[key] > self._used_here[key]:
            return key
        twice = self._used_here[key] > 1
        return ("again", self._numbers.setdefault(key, len(self._numbers))) if twice else None

    def _module(self, module: nn.Module) -> Hashable:
        tensors = tuple(
            (name, None if t is None else (tuple(t.shape), t.dtype, self._shared(t)))
            for table in (module._parameters, module._buffers)
            for name, t in table.items()
        )
        attributes = tuple(
            (name, self._attribute(name, value))
            for name, value in sorted(vars(module).items())
            if name not in _TABLES
        )
        return tensors, attributes

    def _attribute(self, name: str, value: Any) -> Hashable:
        if type(value) is int and self._index is not None and _INDEX.search(name):
            return ("relative", value - self._index)
        if name.startswith("_") and "hooks" in name and isinstance(value, Mapping):
            return tuple(self._value(hook) for hook in value.values())  # their keys are a counter
        return self._value(value)

    def _value(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return (type(value).__name__, repr(value))
        if isinstance(value, nn.Module):
            return ("module", self._names.get(id(value), id(value)))
        if isinstance(value, torch.Tensor | type | types.FunctionType | types.BuiltinFunctionType):
            return id(value)
        if id(value) in self._open:
            return "cycle"
        self._open.add(id(value))
        try:
            return (id(type(value)), self._parts(value))
        finally:
            self._open.remove(id(value))

    def _parts(self, value: Any) -> Hashable:
        if isinstance(value, list | tuple):
            return tuple(self._value(item) for item in value)
        if isinstance(value, set | frozenset):
            return frozenset(self._value(item) for item in value)
        if isinstance(value, Mapping):
            return tuple((self._value(k), self._value(v)) for k, v in value.items())
        if isinstance(value, functools.partial):
            return self._value((value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return self._value((value.__func__, value.__self__))
        if hasattr(value, "__dict__") and not hasattr(value, "__slots__"):
            return tuple((name, self._value(v)) for name, v in sorted(vars(value).items()))
        return id(value)
