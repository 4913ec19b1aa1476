"""The kinds of routers, by how they score: one file for each but the linear one."""

from typing import Final

from upcycle.routers.cosine import CosineRouter
from upcycle.routers.mlp import MLPRouter
from upcycle.routers.neurons import NeuronsRouter
from upcycle.routers.noisy import NoisyRouter
from upcycle.routers.oracle import OracleRouter
from upcycle.routers.table import TableRouter
from upcycle.routing import Router

ROUTERS: Final[dict[str, type[Router]]] = {
    "linear": Router,
    "mlp": MLPRouter,
    "neurons": NeuronsRouter,
    "cosine": CosineRouter,
    "noisy": NoisyRouter,
    "table": TableRouter,
    "oracle": OracleRouter,
}
