"""The kinds of routers, by how they score: one file for each but the linear one.

Those of others are in `upcycle.layers.config.OTHER_KINDS` once a configuration names them.
"""

from typing import Final

from upcycle.layers.installed import find_installed
from upcycle.layers.router import Router
from upcycle.layers.routers.cosine import CosineRouter
from upcycle.layers.routers.mlp import MLPRouter
from upcycle.layers.routers.neurons import NeuronsRouter
from upcycle.layers.routers.noisy import NoisyRouter
from upcycle.layers.routers.oracle import OracleRouter
from upcycle.layers.routers.table import TableRouter

ROUTER_KINDS: Final[dict[str, type[Router]]] = {
    "linear": Router,
    "mlp": MLPRouter,
    "neurons": NeuronsRouter,
    "cosine": CosineRouter,
    "noisy": NoisyRouter,
    "table": TableRouter,
    "oracle": OracleRouter,
}

find_installed()
