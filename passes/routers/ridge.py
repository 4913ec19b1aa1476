"""A linear router that predicts what each expert would add, fitted in closed form."""

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.method import Parts
from upcycle.passes.routers.contributions import contributions, regress
from upcycle.passes.routers.method import RouterMethod, linear


def ridge(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: FFNInputs | None,
) -> dict[str, torch.Tensor]:
    """Regress the size of each expert's contribution on the token.

    The size is that of `passes.routers.contributions`. With X the tokens and T the sizes, centred,
    the rows are the solution of ``(X'X + lambda I) W = X'T``; lambda is ``router.ridge`` times the
    mean of the diagonal. The means go into the bias, which is therefore on unless the recipe says
    otherwise.

    Args:
        ffn: the dense FFN.
        parts: E routed experts.
        spec: ``router.ridge``, ``router.bias``.
        generator: unused.
        data: the calibration tokens; two sums of [D, D] and [D, E] are kept of them, float64.

    Returns:
        ``weight`` [E, D] and, if ``router.bias``, ``bias`` [E]; float32.

    Source:
        closed form of the distilled router of Zhang et al., "MoEfication", 2021,
        https://arxiv.org/abs/2110.01786
    """
    assert data is not None, "`passes.needs` asks for it"
    sizes = contributions(ffn, parts.experts.neuron_EI, data)
    weight_ED, bias_E = regress(sizes, penalty=spec.router.ridge)
    return linear(weight_ED, spec, bias_E)


RIDGE = RouterMethod(
    name="ridge",
    build=ridge,
    kinds=frozenset({"split", "subsets"}),
    otherwise="ranks parts of an FFN by what they add, and copies all add the same; "
    "use an expert method that splits",
    paper='Zhang et al., "MoEfication", 2021',
    source="https://arxiv.org/abs/2110.01786",
    needs=frozenset({"activations"}),
    bias=True,
    reads=frozenset({"ridge"}),
)
