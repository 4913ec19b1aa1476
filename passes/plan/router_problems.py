"""Routers that a recipe can spell and that make no sense, each with a sentence that says so."""

from collections.abc import Iterator

from upcycle.ir.spec import router_kind
from upcycle.passes.routers import ROUTER_METHODS
from upcycle.recipe.schema import Router

# Fields that only some methods or selections read, and which.
_OF_METHOD: dict[str, tuple[str, ...]] = {
    "std": ("normal", "uniform", "virtual_group", "noisy_topk", "random_fixed"),
    "hidden": ("mlp", "cosine"),
    "ridge": ("ridge", "kmeans_lsq"),
    "by": ("hash", "assigned"),
    "entries": ("hash", "assigned"),
    "tied": ("avg_key",),
}
_OF_SELECT: dict[str, tuple[str, ...]] = {
    "mass": ("top_p", "entropy"),
    "above": ("entropy",),
    "q": ("entropy",),
    "nulls": ("null",),
    "balance": ("top_k", "null"),
}


def resolved(router: Router) -> Router:
    """The same router with `bias` decided."""
    if router.bias is not None:
        return router
    return router.model_copy(update={"bias": ROUTER_METHODS[router.method].bias})


def router_problems(router: Router) -> Iterator[str]:
    """What is wrong with the `router` section whatever the FFN is."""
    kind = router_kind(router)
    for readers, key in ((_OF_METHOD, "method"), (_OF_SELECT, "select")):
        for name, known in readers.items():
            is_set = getattr(router, name) != type(router).model_fields[name].default
            if is_set and getattr(router, key) not in known:
                yield (
                    f"`router.{name}` is of no use with `{key}: {getattr(router, key)}`; leave it "
                    f"out, or set `router.{key}` to {' or '.join(f'`{k}`' for k in known)}"
                )
    if router.select == "null" and not router.nulls:
        yield "`select: null` needs experts that do nothing; set `router.nulls` to 1 or more"
    if router.select == "null" and kind not in ("linear", "noisy"):
        yield f"`method: {router.method}` scores no null experts; use a linear router"
    if router.select == "all" and router.top_k != "all":
        yield "`select: all` visits every expert, so `router.top_k` has to be `all`"
    if router.bias and kind not in ("linear", "noisy", "mlp"):
        yield f"a router of `method: {router.method}` has no bias; leave `router.bias` out"
    if kind == "table" and (router.select != "top_k" or router.balance):
        yield (
            f"`method: {router.method}` gives every token its `top_k` experts; leave "
            "`router.select` and `router.balance` out"
        )
    if kind == "oracle" and (router.select, router.weights) != ("top_k", "one"):
        yield "`method: oracle` ranks what experts add; set `select: top_k` and `weights: one`"
