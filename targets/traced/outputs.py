"""What a model returns, as the outputs of a graph: tensors, each with a name."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from upcycle.targets.traced.parts import Compute


def named_tensors(result: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of what a model returned, by name, in order; all else is left out."""
    if isinstance(result, torch.Tensor):
        return {name or "output": result}
    parts: list[tuple[str, Any]] = []
    if isinstance(result, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), part) for key, part in result.items()]
    elif isinstance(result, (tuple, list)):
        parts = [(f"{name or 'output'}.{i}", part) for i, part in enumerate(result)]
    found: dict[str, torch.Tensor] = {}
    for key, part in parts:
        found |= named_tensors(part, key)
    return found


class _Held(nn.Module):
    """A graph as a module of Python, with the same modules and weights under the same names.

    `torch.export` reads the code of a graph, and not the forward that was put in its place.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers"):
            vars(self)[kind].update(vars(graph)[kind])
        self.training = graph.training
        vars(self)["forward"] = graph.forward


def as_python(model: nn.Module) -> nn.Module:
    """`model`, or what stands for it if it is a graph: its forward can be replaced."""
    return _Held(model) if isinstance(model, fx.GraphModule) else model


@contextmanager
def tensor_outputs(
    model: nn.Module, compute: Compute, inputs: Mapping[str, str], *, as_dict: bool = False
) -> Iterator[list[str]]:
    """Within it `model` returns a flat tuple of tensors; the value holds their names after a run.

    It is a dict of them, by name, if `as_dict`.

    It computes what `compute` does, see `upcycle.targets.traced.parts`, instead of its forward, of
    the arguments that are the values of `inputs`; the keys are their names in the graph.
    """
    names: list[str] = []
    forward = model.forward

    @functools.wraps(forward)
    def flat(**kwargs: Any) -> Any:
        given = {name: kwargs[word] for name, word in inputs.items()}
        found = named_tensors(compute(forward, given))
        names[:] = found
        return found if as_dict else tuple(found.values())

    # torch.export asks for the names of the arguments
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = [inspect.Parameter(word, kind) for word in inputs.values()]
    vars(flat)["__signature__"] = inspect.Signature(arguments)
    with replaced(model, "forward", flat):
        yield names


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within it `module` has this `method` of its own in the place of one of its class."""
    before = vars(module).get(name)
    vars(module)[name] = method
    try:
        yield
    finally:
        del vars(module)[name]
        if before is not None:
            vars(module)[name] = before
