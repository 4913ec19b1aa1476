"""One hook on every router: it changes what the router returns, and hands it to who looks on.

Which views are open is known to the thread that opened them, and to no other.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from upcycle.errors import UnsupportedError
from upcycle.routing.change import Change, changed
from upcycle.routing.contract import RoutedLayer, Routing, as_routing
from upcycle.util.modules import unwrapped

Seen = Callable[[RoutedLayer, Routing], None]


@dataclass(frozen=True, eq=False)
class View:
    """What is done with the routing of the layers of one model.

    Attributes:
        changes: by number of the layer.
        seen: gets the routing after all changes; None if nobody looks on.
        lasts: it holds in every thread, for as long as the model lives.
    """

    layers: tuple[RoutedLayer, ...]
    changes: Mapping[int, Change] = field(default_factory=dict)
    seen: Seen | None = None
    lasts: bool = False


_open: ContextVar[tuple[View, ...]] = ContextVar("upcycle.routing", default=())
_hooks = threading.Lock()


@contextmanager
def opened(model: nn.Module, view: View) -> Iterator[None]:
    """Within it the forwards of this thread see the `view`; inner views come after outer ones.

    Raises:
        UnsupportedError: the model is compiled, and would not notice.
    """
    _check(model)
    with ExitStack() as undo:
        for handle in _hooked(view):
            undo.callback(_remove, handle)
        token = _open.set((*_open.get(), view))
        try:
            yield
        finally:
            _open.reset(token)


def attach(model: nn.Module, view: View) -> None:
    """Every forward of `model` sees the `view` from now on, before all that are opened.

    Raises:
        UnsupportedError: the model is compiled, and would not notice.
    """
    _check(model)
    assert view.lasts
    for _ in _hooked(view):
        pass


def _check(model: nn.Module) -> None:
    if model is not unwrapped(model) or any(m._compiled_call_impl for m in model.modules()):
        raise UnsupportedError(
            "the model is compiled or spread over devices, and would not notice; give the module "
            "that it was made from"
        )


def _hooked(view: View) -> Iterator[Any]:
    """Hook the layers of a view; yields what removes each hook."""
    for layer in view.layers:
        if view.seen is not None or layer.number in view.changes:
            with _hooks:
                handle = layer.router.register_forward_hook(partial(_hook, view, layer))
            yield handle


def is_open(view: View) -> bool:
    """Whether this thread has it open."""
    return view in _open.get()


def _remove(handle: Any) -> None:
    with _hooks:
        handle.remove()


def _hook(
    view: View, layer: RoutedLayer, router: nn.Module, args: tuple[Any, ...], output: Any
) -> Routing | None:
    """Of all views on this router that hold here the first one acts, for all of them."""
    with _hooks:
        hooks = [hook for hook in router._forward_hooks.values() if isinstance(hook, partial)]
    hooked: list[tuple[View, RoutedLayer]] = [h.args[:2] for h in hooks if h.func is _hook]
    found = [(v, own) for v, own in hooked if v.lasts]
    found += [(v, own) for v in _open.get() for w, own in hooked if v is w]
    if not found or found[0][0] is not view:
        return None
    changes = [v.changes[own.number] for v, own in found if own.number in v.changes]
    routing = as_routing(layer, output)
    if changes:
        routing = changed(layer, args, routing, changes)
    for v, own in found:
        if v.seen is not None:
            v.seen(own, routing)
    return routing if changes else None
