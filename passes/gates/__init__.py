"""How the router is made, one method per file.

To add one: write its file, add it to `GATES` and its name to `upcycle.recipe.Router`.
"""

from typing import Final

from upcycle.passes.gates.avg_key import AVG_KEY
from upcycle.passes.gates.centroid import CENTROID
from upcycle.passes.gates.cosine import COSINE
from upcycle.passes.gates.kmeans_lsq import KMEANS_LSQ
from upcycle.passes.gates.method import GateMethod
from upcycle.passes.gates.mlp import MLP
from upcycle.passes.gates.noisy_topk import NOISY_TOPK
from upcycle.passes.gates.normal import NORMAL
from upcycle.passes.gates.oracle import ORACLE
from upcycle.passes.gates.random_fixed import RANDOM_FIXED
from upcycle.passes.gates.representative import REPRESENTATIVE
from upcycle.passes.gates.ridge import RIDGE
from upcycle.passes.gates.table import ASSIGNED, HASH
from upcycle.passes.gates.uniform import UNIFORM
from upcycle.passes.gates.virtual_group import VIRTUAL_GROUP
from upcycle.passes.gates.zero import ZERO

GATES: Final[dict[str, GateMethod]] = {
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

__all__ = ["GATES", "GateMethod"]
