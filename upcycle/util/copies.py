"""Copies of a model, its tensors, and what a forward leaves behind in it."""

import copy
import sys
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from upcycle.errors import UnsupportedError

Module = TypeVar("Module", bound=nn.Module)

_MOST_HELPERS = 10_000  # objects beside modules whose attributes are looked after
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def copy_of(model: Module, instead: Mapping[int, Any] | None = None) -> Module:
    """A deep copy of `model`; a lock, a staticmethod or the like, which has no copy, is shared.

    Args:
        model: left alone.
        instead: what stands in the copy for objects, by their ids.

    Raises:
        UnsupportedError: a module refuses to be copied.
    """
    memo = dict(instead or {})
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        failure: Exception | None = error
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    while failure is not None:  # look for the others without copying tensors each time
        thing = _refusing(failure)
        if thing is None or isinstance(thing, nn.Module) or id(thing) in memo:
            names = [name for name, module in model.named_modules() if module is thing]
            at = f"`{names[0]}`" if names and names[0] else "it"
            raise UnsupportedError(
                f"{type(model).__name__}: {at} cannot be copied ({failure}), and the dense model "
                "is to be left alone; give it a `__deepcopy__` that works"
            ) from failure
        memo |= {id(other): _instead_of(other) for other in [thing, *_alike(model, thing)]}
        try:
            copy.deepcopy(model, tensors | memo)
            failure = None
        except Exception as error:
            failure = error
    return copy.deepcopy(model, memo)


def _refusing(error: Exception) -> Any:
    """The object that could not be copied."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if frame.f_code is copy.deepcopy.__code__]
    return own[-1].f_locals["x"] if own else None


def _alike(model: nn.Module, thing: Any) -> list[Any]:
    """The attributes of modules of the same type: they refuse, too."""
    if isinstance(thing, torch.Tensor):
        return []
    return [v for m in model.modules() for v in vars(m).values() if type(v) is type(thing)]


def _instead_of(thing: Any) -> Any:
    """A tensor that is the result of a computation has a copy without its history."""
    return thing.detach().clone() if isinstance(thing, torch.Tensor) else thing


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``model.state_dict()``, which may hold other things, too."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def untied_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, without the tensors that transformers ties to another one on loading."""
    state = tensors_of(model)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {
        name: tensor
        for name, tensor in state.items()
        if tied.get(name) not in state or tensor.data_ptr() != state[tied[name]].data_ptr()
    }


@contextmanager
def buffers_restored(model: nn.Module, *, but: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Undo what the forward writes into buffers, except for those of the modules `but`."""
    left = {id(buffer) for module in but for buffer in module.buffers()}
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in left]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in before:
                buffer.copy_(content)


@contextmanager
def state_restored(model: nn.Module, *, but: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Undo every attribute that the forward sets: fake tensors, say, must not stay in the model.

    So do objects that modules hold, as a distribution that a policy fills. Tables, lists, dicts and
    sets get their old contents back, too. What the modules `but`, and those inside, have set stays.
    """
    left = {inner for module in but for inner in module.modules()}
    modules = [module for module in model.modules() if module not in left]
    saved = [
        (
            vars(holder),
            dict(vars(holder)),
            [(v, v.copy()) for v in vars(holder).values() if type(v) in _CONTAINERS],
        )
        for holder in (*modules, *_helpers(modules))
    ]
    try:
        yield
    finally:
        for attributes, before, containers in saved:
            attributes.clear()
            attributes.update(before)
            for container, contents in containers:
                container.clear()
                if isinstance(container, list):
                    container.extend(contents)
                else:
                    container.update(contents)


def _helpers(modules: Iterable[nn.Module]) -> list[Any]:
    """Objects of Python classes that the modules hold, directly or in containers."""
    found: list[Any] = []
    seen: set[int] = set()
    values = [value for module in modules for value in vars(module).values()]
    while values and len(found) < _MOST_HELPERS:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple | set):
            values += value
        elif _is_helper(value):
            found.append(value)
            values += vars(value).values()
    return found


def _is_helper(value: Any) -> bool:
    kinds = (nn.Module, torch.Tensor, type, ModuleType, FunctionType, MethodType, partial)
    if isinstance(value, kinds) or not hasattr(type(value), "__dict__"):
        return False
    home = type(value).__module__.partition(".")[0]  # loggers, locks and files are no state
    return home not in sys.stdlib_module_names and type(_vars_of(value)) is dict


def _vars_of(value: Any) -> object:
    """The attributes of an object that has its own; None for others, and for one that refuses."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
