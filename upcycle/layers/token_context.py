"""What a router may read besides the tokens: their ids, their types, or the domain of a text.

A `TokenContext` hooks the nearest module above a layer that is called with them, so it also works
where ``generate`` calls an encoder alone, and with a cache, where the ids are those of new tokens.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ARGUMENTS = {"token": "input_ids", "type": "token_type_ids", "domain": "domain_ids"}


class ForwardState:
    """What one module leaves for a later one of the same forward, in each thread: a tensor, mostly.

    A copy or a pickle of a model is not in the middle of a forward, so it holds nothing.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._compiled: Any = None  # what a compiler can follow

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ForwardState, ()

    def put(self, tensor: Any) -> None:
        """What `get` and `take` return from now on."""
        if torch.compiler.is_compiling():
            self._compiled = tensor
        else:
            self._thread.tensor = tensor

    def get(self) -> Any:
        """What was put last; None if nothing was."""
        if torch.compiler.is_compiling():
            return self._compiled
        return getattr(self._thread, "tensor", None)

    def take(self) -> Any:
        """As `get`, once; also eagerly what was put in a compiled part of the forward."""
        tensor, self._compiled = self._compiled, None
        if tensor is None and not torch.compiler.is_compiling():
            tensor, self._thread.tensor = self.get(), None
        return tensor


class TokenContext:
    """A forward pre-hook that keeps one argument of a module for the layers below.

    Token types and domains that are not given count as 0, as BERT counts types; token ids have to
    be given.

    Args:
        by: ``token``, ``type`` or ``domain``.
        position: of the argument among those of the module; None if it has no such argument. The
            hook then takes it out of the keyword arguments.
    """

    def __init__(self, by: str, position: int | None) -> None:
        self.by = by
        self.name = ARGUMENTS[by]
        self.position = position
        self.always: torch.Tensor | None = None  # where the argument is not given
        self._state = ForwardState()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Keep the argument; as ``register_forward_pre_hook(..., with_kwargs=True)`` calls it."""
        ids = kwargs.get(self.name)
        if ids is None and self.position is not None and self.position < len(args):
            ids = args[self.position]
        self.keep(self.always if ids is None else ids)
        if self.position is None:
            kwargs = {name: value for name, value in kwargs.items() if name != self.name}
        return args, kwargs

    def keep(self, ids: torch.Tensor | None) -> None:
        """What `of_tokens` returns from now on, in this thread."""
        self._state.put(ids)

    def of_tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The kept ids, one for each token, [T] int64.

        Raises:
            RuntimeError: token ids are missing, or there are not as many as tokens.
        """
        ids: torch.Tensor | None = self._state.get()
        count = x_TD.shape[0]
        if ids is None:
            if self.by == "token":
                raise RuntimeError(
                    f"the router of an MoE layer looks at {self.name}, and they were not given"
                )
            return x_TD.new_zeros(count, dtype=torch.int64)
        if ids.ndim == 1 and ids.shape[0] != count and count % ids.shape[0] == 0:
            ids = ids.repeat_interleave(count // ids.shape[0])  # one for each text
        ids_T = ids.reshape(-1)
        if ids_T.shape[0] != count:
            raise RuntimeError(
                f"the router of an MoE layer has {count} tokens and {self.name} of shape "
                f"{list(ids.shape)}; its FFN does not see the tokens of the input one by one"
            )
        return ids_T.to(x_TD.device)


def hooked_module(model: nn.Module, path: str, by: str) -> tuple[str, int | None] | None:
    """The nearest module above `path` that has the argument of `TokenContext`, and its position.

    A domain that is an argument of no module is taken by the model itself; else None.
    """
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        above = ".".join(parts[:end])
        names = list(inspect.signature(model.get_submodule(above).forward).parameters)
        if ARGUMENTS[by] in names:
            return above, names.index(ARGUMENTS[by])
    return ("", None) if by == "domain" else None


def tell_routers(model: nn.Module, routers: Mapping[str, nn.Module]) -> None:
    """Register the hooks on `model` that its routers need; `routers` are by the path of a layer."""
    contexts: dict[tuple[str, str], TokenContext] = {}
    for path, router in routers.items():
        by = getattr(router, "by", None)
        if by is None:
            continue
        found = hooked_module(model, path, by)
        if found is None:
            raise RuntimeError(f"{path}: no module above it is called with {ARGUMENTS[by]}")
        above, position = found
        if (above, by) not in contexts:
            context = contexts[above, by] = TokenContext(by, position)
            model.get_submodule(above).register_forward_pre_hook(context, with_kwargs=True)
        router.given = contexts[above, by]  # type: ignore[assignment]  # no module


@contextmanager
def domains(model: nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """Within it the texts that `model` is given are of the domains `ids`, [texts] int64.

    For ``generate``, which takes no ``domain_ids``.
    """
    contexts: list[Any] = [m.given for m in model.modules() if getattr(m, "by", None) == "domain"]
    try:
        for context in contexts:
            context.always = ids
        yield
    finally:
        for context in contexts:
            context.always = None
