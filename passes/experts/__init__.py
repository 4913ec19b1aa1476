"""How experts are made from a dense FFN, one method per file.

To add one: write its file, add it to `EXPERTS` and its name to `upcycle.recipe.Experts`.
"""

from typing import Final

from upcycle.passes.experts.cluster import CLUSTER
from upcycle.passes.experts.contiguous import CONTIGUOUS
from upcycle.passes.experts.copy import COPY
from upcycle.passes.experts.drop import DROP
from upcycle.passes.experts.from_checkpoints import FROM_CHECKPOINTS
from upcycle.passes.experts.granular import GRANULAR
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.noise import NOISE
from upcycle.passes.experts.random import RANDOM
from upcycle.passes.experts.svd import SVD
from upcycle.passes.experts.token_sets import TOKEN_SETS
from upcycle.passes.experts.zero_routed import ZERO_ROUTED

EXPERTS: Final[dict[str, ExpertMethod]] = {
    "copy": COPY,
    "noise": NOISE,
    "drop": DROP,
    "svd": SVD,
    "granular": GRANULAR,
    "zero_routed": ZERO_ROUTED,
    "from_checkpoints": FROM_CHECKPOINTS,
    "contiguous": CONTIGUOUS,
    "random": RANDOM,
    "cluster": CLUSTER,
    "token_sets": TOKEN_SETS,
}

__all__ = ["EXPERTS", "ExpertMethod"]
