"""Each expert gets the neurons that matter most to one domain of texts."""

import numpy as np
import torch

from upcycle.errors import UsageError
from upcycle.passes.experts.balanced import assign
from upcycle.passes.experts.method import DenseLayer, ExpertMethod
from upcycle.passes.experts.split import deal, group_sizes, split
from upcycle.passes.experts.useful import importance_of, ranks


def domain_ranks(dense: DenseLayer) -> torch.Tensor:
    """The rank of each neuron in each expert's domain, [E, F], as `ranks` gives them.

    Raises:
        UsageError: there are not as many domains as routed experts.
    """
    spec, importance_NF = dense.spec, importance_of(dense.data)
    found = len(importance_NF)
    if found != spec.num_experts:
        raise UsageError(
            f"{spec.ffn.path}: `experts.method: {spec.experts.method}` makes an expert for each "
            f"domain of the calibration texts, and there are {spec.num_experts} routed experts and "
            f"{found} domain{'' if found == 1 else 's'}; make them equal"
        )
    return ranks(importance_NF)


def gradient_domain(dense: DenseLayer) -> torch.Tensor:
    """Give each neuron to one domain such that the sum of its ranks there is as large as can be.

    The rank of a neuron among all for a domain is that of ``|h dL/dh|``, averaged over the tokens
    of the domain. The paper assigns greedily, by importance itself, where a domain of large
    gradients takes all it wants first; this is the exact optimum for groups of equal size. That is
    its *independent* split; its *inter-sharing* is the same with ``experts.shared`` and
    ``shared_by: domains``; its *inner-sharing* is `gradient_domain_overlap`.

    Exact when every expert is chosen with weight one.
    Memory: E * F float64 while it runs.

    Source:
        Zhu et al., "LLaMA-MoE", 2024, section 3.1, https://arxiv.org/abs/2406.16554
    """
    rank_EF = domain_ranks(dense)
    sizes_E = np.asarray(group_sizes(rank_EF.shape[1], len(rank_EF)))
    labels_F, _ = assign(-rank_EF.double().numpy(), sizes_E, np.zeros(len(rank_EF)))
    order_F = torch.from_numpy(labels_F).argsort(stable=True)
    return deal(order_F, len(rank_EF), dense.spec.width)


GRADIENT_DOMAIN = ExpertMethod(
    name="gradient_domain", kind="split", build=split(gradient_domain), needs="gradients"
)
