"""A linear router that predicts what each expert would add, fitted in closed form."""

import torch

from upcycle.activations import Activations
from upcycle.passes.experts.method import Parts
from upcycle.passes.gates.method import GateMethod, linear
from upcycle.spec import MoESpec
from upcycle.weights import FFNWeights


def ridge(
    ffn: FFNWeights,
    parts: Parts,
    spec: MoESpec,
    *,
    generator: torch.Generator,
    data: Activations | None,
) -> dict[str, torch.Tensor]:
    """Regress the size of each expert's contribution on the token.

    The size is the sum over the neurons of the expert of ``|h_j|`` times the length of column j of
    the contraction. With X the tokens, centred, and T the sizes, centred, the rows are the solution
    of ``(X'X + lambda I) W = X'T``; lambda is ``router.ridge`` times the mean of the diagonal.
    The means go into the bias, so ``router.bias`` must be on for the fit to be complete.

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
    neuron_EI = parts.experts.neuron_EI
    member_FE = torch.zeros(ffn.down_OF.shape[1] + 1, len(neuron_EI))
    member_FE[neuron_EI.clamp(min=-1), torch.arange(len(neuron_EI))[:, None]] = 1
    length_F1 = ffn.down_OF.float().norm(dim=0)[:, None]
    member_FE = member_FE[:-1] * length_F1  # the last row collected the padding
    width, count = ffn.up_MFD.shape[-1], len(data)
    xx_DD = torch.zeros(width, width, dtype=torch.float64)
    xt_DE = torch.zeros(width, len(neuron_EI), dtype=torch.float64)
    sum_D, sum_E = xx_DD.new_zeros(width), xx_DD.new_zeros(len(neuron_EI))
    for x_TD, h_TF in data.hidden(ffn):
        x_TD, size_TE = x_TD.double(), (h_TF.abs() @ member_FE).double()
        xx_DD += x_TD.t() @ x_TD
        xt_DE += x_TD.t() @ size_TE
        sum_D += x_TD.sum(0)
        sum_E += size_TE.sum(0)
    mean_D, mean_E = sum_D / count, sum_E / count
    xx_DD -= count * mean_D.outer(mean_D)
    xt_DE -= count * mean_D.outer(mean_E)
    xx_DD.diagonal().add_(spec.router.ridge * xx_DD.diagonal().mean())
    weight_ED = torch.linalg.solve(xx_DD, xt_DE).t()
    made = linear(weight_ED.float(), spec)
    if "bias" in made:
        made["bias"][: len(weight_ED)] = (mean_E - weight_ED @ mean_D).float()
    return made


RIDGE = GateMethod(
    name="ridge",
    build=ridge,
    kinds=frozenset({"split", "subsets"}),
    otherwise="ranks parts of an FFN by what they add, and copies all add the same; "
    "use an expert method that splits",
    paper='Zhang et al., "MoEfication", 2021',
    source="https://arxiv.org/abs/2110.01786",
    needs=frozenset({"activations"}),
)
