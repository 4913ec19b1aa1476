"""How experts are made from a dense FFN, one method per file.

To add one: write its file, add it to `EXPERTS`, and its name to `ExpertMethodName` in
`upcycle.recipe.methods`. Methods of other packages are in `EXPERTS` once they are looked up.
"""

from typing import Final

from upcycle.passes.experts.activation_carve import ACTIVATION_CARVE
from upcycle.passes.experts.cluster import CLUSTER
from upcycle.passes.experts.coactivation import COACTIVATION
from upcycle.passes.experts.contiguous import CONTIGUOUS
from upcycle.passes.experts.copy import COPY
from upcycle.passes.experts.drop import DROP
from upcycle.passes.experts.from_checkpoints import FROM_CHECKPOINTS
from upcycle.passes.experts.gradient_domain import GRADIENT_DOMAIN
from upcycle.passes.experts.gradient_domain_overlap import GRADIENT_DOMAIN_OVERLAP
from upcycle.passes.experts.granular import GRANULAR
from upcycle.passes.experts.importance import IMPORTANCE
from upcycle.passes.experts.importance_overlap import IMPORTANCE_OVERLAP
from upcycle.passes.experts.method import ExpertMethod, as_expert_method
from upcycle.passes.experts.noise import NOISE
from upcycle.passes.experts.random import RANDOM
from upcycle.passes.experts.svd import SVD
from upcycle.passes.experts.token_sets import TOKEN_SETS
from upcycle.passes.experts.universal_specialised import UNIVERSAL_SPECIALISED
from upcycle.passes.experts.zero_routed import ZERO_ROUTED
from upcycle.recipe.methods import EXPERT_METHODS
from upcycle.util.registry import Registry

EXPERTS: Final[Registry[ExpertMethod]] = EXPERT_METHODS
EXPERTS.adapt = as_expert_method
EXPERTS.build_in(
    (method.name, method)
    for method in (
        *(COPY, NOISE, DROP, SVD, GRANULAR, ZERO_ROUTED, FROM_CHECKPOINTS),
        *(CONTIGUOUS, RANDOM, CLUSTER, COACTIVATION, ACTIVATION_CARVE),
        *(IMPORTANCE, IMPORTANCE_OVERLAP, GRADIENT_DOMAIN, GRADIENT_DOMAIN_OVERLAP),
        *(UNIVERSAL_SPECIALISED, TOKEN_SETS),
    )
)
