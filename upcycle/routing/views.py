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
    """

    layers: tuple[RoutedLayer, ...]
    changes: Mapping[int, Change] = field(default_factory=dict)
    seen: Seen | None = None


_open: ContextVar[tuple[View, ...]] = ContextVar("upcycle.routing", default=())
_hooks = threading.Lock()


@contextmanager
def opened(model: nn.Module, view: View) -> Iterator[None]:
    """Within it the forwards of this thread see the `view`; inner views come after outer ones.

    Raises:
        UnsupportedError: the model is compiled, and would not notice.
    """
    if model is not unwrapped(model) or any(m._compiled_call_impl for m in model.modules()):
        raise UnsupportedError(
            "the model is compiled or spread over devices, and would not notice; give the module "
            "that it was made from"
        )
    with ExitStack() as undo:
        for layer in view.layers:
            if view.seen is None and layer.number not in view.changes:
                continue
            hook = partial(_hook, view, layer)
            with _hooks:
                handle = layer.router.register_forward_hook(hook)
            undo.callback(_remove, handle)
        token = _open.set((*_open.get(), view))
        try:
            yield
        finally:
            _open.reset(token)


def is_open(view: View) -> bool:
    """Whether this thread has it open."""
    return view in _open.get()


def _remove(handle: Any) -> None:
    with _hooks:
        handle.remove()


def _hook(
    view: View, layer: RoutedLayer, router: nn.Module, args: tuple[Any, ...], output: Any
) -> Routing | None:
    """Of all open views on this router the first one acts, for all of them."""
    found = [(v, own) for v in _open.get() if (own := _layer_of(v, router)) is not None]
    if not found or found[0][0] is not view:
        return None
    changes = [v.changes[own.number] for v, own in found if own.number in v.changes]
    routing = as_routing(layer, output)
    if changes:
        routing = changed(layer, args, routing, changes)
    for other, own in found:
        if other.seen is not None:
            other.seen(own, routing)
    return routing if changes else None


def _layer_of(view: View, router: nn.Module) -> RoutedLayer | None:
    """The layer of `view` with this router, if its hook is there."""
    own = next((layer for layer in view.layers if layer.router is router), None)
    has_hook = own is not None and (view.seen is not None or own.number in view.changes)
    return own if has_hook else None
