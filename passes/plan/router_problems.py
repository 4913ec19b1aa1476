"""Routers that a recipe can spell and that make no sense, each with a sentence that says so."""

from collections.abc import Iterator

from upcycle.layers.config import SELECT_ARGUMENTS
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.recipe.schema import Router

_SELECT_READS = {
    "top_k": ("balance",),
    **SELECT_ARGUMENTS,
    "null": (*SELECT_ARGUMENTS["null"], "balance"),
}


def resolved(router: Router) -> Router:
    """The same router with `bias` decided."""
    if router.bias is not None:
        return router
    return router.model_copy(update={"bias": ROUTER_METHODS[router.method].bias})


def router_problems(router: Router) -> Iterator[str]:
    """What is wrong with the `router` section whatever the FFN is."""
    method_reads = {name: method.reads for name, method in ROUTER_METHODS.items()}
    for key, reads in (("method", method_reads), ("select", _SELECT_READS)):
        for name, field in Router.model_fields.items():
            readers = [reader for reader, fields in reads.items() if name in fields]
            value = getattr(router, key)
            if readers and value not in readers and getattr(router, name) != field.default:
                yield (
                    f"`router.{name}` is of no use with `{key}: {value}`; leave it "
                    f"out, or set `router.{key}` to {' or '.join(f'`{k}`' for k in readers)}"
                )
    if router.select == "null" and not router.nulls:
        yield "`select: null` needs experts that do nothing; set `router.nulls` to 1 or more"
    if router.select == "all" and router.top_k != "all":
        yield "`select: all` visits every expert, so `router.top_k` has to be `all`"
    yield from filter(None, (limit(router) for limit in ROUTER_METHODS[router.method].limits))
