"""How the router is made, one method per file.

To add one: write its file, add it to `ROUTER_METHODS` and its name to
`upcycle.recipe.schema.Router`.
"""

from typing import Final

from upcycle.passes.routers.avg_key import AVG_KEY
from upcycle.passes.routers.centroid import CENTROID
from upcycle.passes.routers.cosine import COSINE
from upcycle.passes.routers.kmeans_lsq import KMEANS_LSQ
from upcycle.passes.routers.method import RouterMethod
from upcycle.passes.routers.mlp import MLP
from upcycle.passes.routers.noisy_topk import NOISY_TOPK
from upcycle.passes.routers.normal import NORMAL
from upcycle.passes.routers.oracle import ORACLE
from upcycle.passes.routers.random_fixed import RANDOM_FIXED
from upcycle.passes.routers.representative import REPRESENTATIVE
from upcycle.passes.routers.ridge import RIDGE
from upcycle.passes.routers.table import ASSIGNED, HASH
from upcycle.passes.routers.uniform import UNIFORM
from upcycle.passes.routers.virtual_group import VIRTUAL_GROUP
from upcycle.passes.routers.zero import ZERO

ROUTER_METHODS: Final[dict[str, RouterMethod]] = {
    "normal": NORMAL,
    "zero": ZERO,
    "uniform": UNIFORM,
    "virtual_group": VIRTUAL_GROUP,
    "avg_key": AVG_KEY,
    "centroid": CENTROID,
    "ridge": RIDGE,
    "mlp": MLP,
    "representative": REPRESENTATIVE,
    "kmeans_lsq": KMEANS_LSQ,
    "random_fixed": RANDOM_FIXED,
    "hash": HASH,
    "assigned": ASSIGNED,
    "noisy_topk": NOISY_TOPK,
    "cosine": COSINE,
    "oracle": ORACLE,
}

__all__ = ["ROUTER_METHODS", "RouterMethod"]
