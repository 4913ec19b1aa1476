"""How experts are made from a dense FFN, one method per file.

To add one: write its file, add it to `EXPERTS` and its name to `upcycle.recipe.Experts`.
"""

from typing import Final

from upcycle.passes.experts.cluster import CLUSTER
from upcycle.passes.experts.contiguous import CONTIGUOUS
from upcycle.passes.experts.copy import COPY
from upcycle.passes.experts.granular import GRANULAR
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.random import RANDOM

EXPERTS: Final[dict[str, ExpertMethod]] = {
    "copy": COPY,
    "granular": GRANULAR,
    "contiguous": CONTIGUOUS,
    "random": RANDOM,
    "cluster": CLUSTER,
}

__all__ = ["EXPERTS", "ExpertMethod"]
