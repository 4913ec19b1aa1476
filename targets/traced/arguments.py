"""The arguments of a forward as a graph has them: tensors are inputs, all else is constant."""

import enum
import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UnsupportedError

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, slice)
_FORM = {"return_dict", "use_cache"}  # how a model of transformers hands out the same numbers


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a forward, flat.

    Attributes:
        tensors: by name, in the order of the signature: the argument, or ``obs.a``, ``pair.0`` for
            what is inside of one.
        constants: the numbers, flags and words among them, by name.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    _names: tuple[str, ...]
    _form: pytree.TreeSpec
    _signature: inspect.Signature

    def call(self, forward: Callable[..., Any], tensors: Mapping[str, Tensor]) -> Any:
        """What `forward` returns for other `tensors`; those of new names are passed by name."""
        values = {**self.constants, **tensors}
        arguments = pytree.tree_unflatten([values.pop(name) for name in self._names], self._form)
        bound = inspect.BoundArguments(self._signature, arguments)
        more = {name: values[name] for name in tensors if name in values}
        return forward(*bound.args, **bound.kwargs, **more)

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """The constants that are not the default of their argument."""
        defaults = {name: p.default for name, p in self._signature.parameters.items()}
        return {
            name: value
            for name, value in self.constants.items()
            if (type(value), value) != (type(default := defaults.get(name)), default)
        }


def arguments_of(model: nn.Module, example: ExampleInputs) -> Arguments:
    """The arguments of ``model(*example)``, or of ``model(**example)``.

    Raises:
        UnsupportedError: something among them is no tensor and no plain value, or they do not fit.
    """
    signature = inspect.signature(model.forward)
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"the example inputs do not fit the forward: {error}") from error
    given = dict(bound.arguments)
    if isinstance(model, PreTrainedModel):
        given = {name: value for name, value in given.items() if name not in _FORM}
    leaves, form = pytree.tree_flatten_with_path(given)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    names = apart(_name(path, kinds) for path, _ in leaves)
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, (_, value) in zip(names, leaves, strict=True):
        if isinstance(value, Tensor):
            # One tensor that is given twice would be one input, and the other one unread.
            is_new = all(value is not known for known in tensors.values())
            tensors[name] = value if is_new else value.clone()
        elif value is None or isinstance(value, _PLAIN):
            constants[name] = value
        else:
            raise UnsupportedError(
                f"its input {name} is a {type(value).__name__}, and a graph has tensors for inputs "
                "and plain values for constants; give those, or dicts and lists of them"
            )
    return Arguments(tensors, constants, tuple(names), form, signature)


def _name(path: Sequence[Any], kinds: Mapping[str, Any]) -> str:
    """``obs.a`` for a path of pytree; what is passed through ``**kwargs`` has its own name."""
    fields = ("key", "idx", "name")  # of MappingKey, SequenceKey and GetAttrKey
    keys = [next(getattr(key, field) for field in fields if hasattr(key, field)) for key in path]
    is_loose = kinds[keys[0]] is inspect.Parameter.VAR_KEYWORD
    return ".".join(str(key) for key in keys[is_loose:])


def apart(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The `names`, all different from each other and from those `taken`."""
    found: list[str] = []
    used = set(taken)
    for name in names:
        free, count = name, 0
        while free in used:
            count += 1
            free = f"{name}_{count}"
        found.append(free)
        used.add(free)
    return found


def identifiers(names: Sequence[str]) -> list[str]:
    """Names of arguments of a Python function for the inputs `names` of a graph."""
    words = (re.sub(r"\W", "_", name, flags=re.ASCII) for name in names)
    return apart(w if w.isidentifier() and not keyword.iskeyword(w) else f"_{w}" for w in words)
