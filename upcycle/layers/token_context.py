"""What a router may need besides the tokens: their ids, their types, or the domain of a text.

A `TokenContext` hooks the nearest module above a layer that is called with them, so it works where
a part of a model is called by itself, as ``generate`` calls an encoder, and with a cache, where the
ids are those of the new tokens.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ARGUMENTS = {"token": "input_ids", "type": "token_type_ids", "domain": "domain_ids"}


class _Kept(threading.local):
    """Each thread has its own; a copy or a pickle of a model is not in the middle of a forward."""

    ids: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


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
        self._kept = _Kept()
        self._compiled: torch.Tensor | None = None  # what a compiler can follow

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Keep the argument; as ``register_forward_pre_hook(..., with_kwargs=True)`` calls it."""
        ids = kwargs.get(self.name)
        if ids is None and self.position is not None and self.position < len(args):
            ids = args[self.position]
        self.keep(self.always if ids is None else ids)
        if self.position is None and self.name in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != self.name}
        return args, kwargs

    def keep(self, ids: torch.Tensor | None) -> None:
        """What `of_tokens` returns from now on, in this thread."""
        if torch.compiler.is_compiling():
            self._compiled = ids
        else:
            self._kept.ids = ids

    def of_tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One number for each token, [T] int64.

        Raises:
            RuntimeError: token ids are missing, or there are not as many as tokens.
        """
        ids = self._compiled if torch.compiler.is_compiling() else self._kept.ids
        if ids is None:
            if self.by == "token":
                raise RuntimeError(
                    f"the router of an MoE layer looks at {self.name}, and they were not given"
                )
            return x_TD.new_zeros(x_TD.shape[0], dtype=torch.int64)
        count = x_TD.shape[0]
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
    """The nearest module above `path` that has the argument, and its position.

    A domain may be an argument of no module: the model itself then takes it. None if there is no
    such module.
    """
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        above = ".".join(parts[:end])
        names = list(inspect.signature(model.get_submodule(above).forward).parameters)
        if ARGUMENTS[by] in names:
            return above, names.index(ARGUMENTS[by])
    return ("", None) if by == "domain" else None


def tell_routers(model: nn.Module, routers: Mapping[str, nn.Module]) -> None:
    """Register the hooks that the routers need.

    Args:
        model: has the layers in place.
        routers: path of a layer -> its router.
    """
    known: dict[tuple[str, str], TokenContext] = {}
    for path, router in routers.items():
        by = getattr(router, "by", None)
        if by is None:
            continue
        found = hooked_module(model, path, by)
        if found is None:
            raise RuntimeError(f"{path}: no module above it is called with {ARGUMENTS[by]}")
        above, position = found
        if (above, by) not in known:
            given = known[above, by] = TokenContext(by, position)
            model.get_submodule(above).register_forward_pre_hook(given, with_kwargs=True)
        router.given = known[above, by]  # type: ignore[assignment]  # no module


@contextmanager
def domains(model: nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """Within it the texts that `model` is given are of the domains `ids`, [texts] int64.

    For ``generate``, which takes no ``domain_ids``.
    """
    routers = [m for m in model.modules() if getattr(m, "by", None) == "domain"]
    known = {id(router.given): router.given for router in routers}
    try:
        for given in known.values():
            given.always = ids  # type: ignore[union-attr]
        yield
    finally:
        for given in known.values():
            given.always = None  # type: ignore[union-attr]
