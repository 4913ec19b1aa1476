"""The kinds of routers, by how they score: one file for each but the linear one."""

from typing import Final

from upcycle.routing import Router

ROUTERS: Final[dict[str, type[Router]]] = {
    "linear": Router,
}
