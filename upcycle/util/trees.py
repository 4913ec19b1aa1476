"""The tensors in what a module is given and returns."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

# Objects that hold tensors which are no results, or none.
_OPAQUE = (nn.Module, Cache, type, types.FunctionType, types.MethodType, types.ModuleType)


def leaves_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors of a nested structure, those in dataclasses included."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, f.name, None) for f in fields(leaf)])
    return found


def results_in(tree: Any) -> list[torch.Tensor]:
    """All tensors of what a model returned, those of objects of any class included."""
    found: list[torch.Tensor] = []
    todo, seen = [tree], set[int]()
    while todo:
        for leaf in pytree.tree_leaves(todo.pop(0)):
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            if isinstance(leaf, torch.Tensor):
                found.append(leaf)
            else:
                todo.append(list(attributes_of(leaf).values()))
    return found


def attributes_of(thing: Any) -> Mapping[str, Any]:
    """The attributes of an object, such as a distribution, which pytree does not know."""
    if isinstance(thing, _OPAQUE):
        return {}
    slots = [name for base in type(thing).__mro__ for name in getattr(base, "__slots__", ())]
    held = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return held | getattr(thing, "__dict__", {})
