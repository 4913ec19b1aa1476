"""A linear router that predicts what each expert would add, fitted in closed form."""

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.contributions import contributions, regress
from upcycle.passes.routers.method import RouterMethod, linear


def ridge(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Regress the size of each expert's contribution on the token.

    The size is that of `passes.routers.contributions`. With X the tokens and T the sizes, centred,
    the rows are the solution of ``(X'X + lambda I) W = X'T``; lambda is ``router.ridge`` times the
    mean of the diagonal. The means go into the bias, which is therefore on unless the recipe says
    otherwise.

    Memory: two sums of [D, D] and [D, E], float64.

    Source:
        closed form of the distilled router of Zhang et al., "MoEfication", 2021,
        https://arxiv.org/abs/2110.01786
    """
    sizes = contributions(dense.ffn, parts.experts.neuron_EI, dense.data)
    weight_ED, bias_E = regress(sizes, penalty=dense.spec.router.ridge)
    return linear(weight_ED, dense.spec, bias_E)


RIDGE = RouterMethod(
    name="ridge",
    build=ridge,
    kinds=frozenset({"split", "subsets"}),
    otherwise="ranks parts of an FFN by what they add, and copies all add the same; "
    "use an expert method that splits",
    needs="activations",
    bias=True,
    reads=frozenset({"ridge"}),
)
