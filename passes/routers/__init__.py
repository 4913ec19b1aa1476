"""How the router is made, one method per file.

To add one: write its file, add it to `ROUTER_METHODS`, and its name to `RouterMethodName` in
`upcycle.recipe.methods`. Methods of other packages are in `ROUTER_METHODS` once they are looked up.
"""

from typing import Final

from upcycle.passes.routers.avg_key import AVG_KEY
from upcycle.passes.routers.centroid import CENTROID
from upcycle.passes.routers.cosine import COSINE
from upcycle.passes.routers.kmeans_lsq import KMEANS_LSQ
from upcycle.passes.routers.method import RouterMethod, as_router_method
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
from upcycle.recipe import methods as recipe
from upcycle.util.registry import Registry

ROUTER_METHODS: Final[Registry[RouterMethod]] = recipe.ROUTER_METHODS
ROUTER_METHODS.adapt = as_router_method
ROUTER_METHODS.build_in(
    (method.name, method)
    for method in (
        *(NORMAL, ZERO, UNIFORM, VIRTUAL_GROUP, AVG_KEY, CENTROID, RIDGE, MLP, REPRESENTATIVE),
        *(KMEANS_LSQ, NOISY_TOPK, RANDOM_FIXED, HASH, ASSIGNED, COSINE, ORACLE),
    )
)
