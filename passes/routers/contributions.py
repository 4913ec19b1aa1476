"""What each expert of a split adds to a token, and a linear map that predicts such numbers.

Shape suffixes: T tokens, D d_model, F neurons, E experts.
"""

from collections.abc import Iterable, Iterator

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights
from upcycle.passes.experts.split import membership

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


def contributions(
    ffn: FFNWeights, neuron_EI: torch.Tensor, data: FFNInputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [t, D] with the size of what each expert adds to them [t, E], float32, in chunks.

    The size is the sum over the neurons of the expert of ``|h_j|`` times the length of column j of
    the contraction. Padding adds nothing.
    """
    length_F = ffn.down_OF.float().norm(dim=0)
    member_FE = (membership(neuron_EI, len(length_F)) * length_F).t().contiguous()
    for x_TD, h_TF in data.hidden(ffn):
        yield x_TD, h_TF.abs() @ member_FE


def regress(pairs: Pairs, *, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of the second on the first: weight [E, D] and bias [E], float64.

    Minimises ``|X W' + b - T|^2 + lambda |W|^2``, lambda being `penalty` times the mean over the
    inputs of their sum of squares about the mean. Two sums of [D, D] and [D, E] are kept, in
    float64, about the first token: a large common offset would cost digits.
    """
    count, origin_D = 0, torch.empty(0)
    sums: list[torch.Tensor] = []
    for x_TD, t_TE in pairs:
        if not count:
            origin_D = x_TD[0].double()
        x_TD, t_TE = x_TD.double() - origin_D, t_TE.double()
        count += len(x_TD)
        new = [x_TD.t() @ x_TD, x_TD.t() @ t_TE, x_TD.sum(0), t_TE.sum(0)]
        sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
    xx_DD, xt_DE, sum_D, sum_E = sums
    mean_D, mean_E = sum_D / count, sum_E / count
    xx_DD -= count * mean_D.outer(mean_D)
    xt_DE -= count * mean_D.outer(mean_E)
    # Tokens that are all equal leave nothing to predict from: then any penalty gives W = 0.
    size = penalty * xx_DD.diagonal().mean()
    xx_DD.diagonal().add_(size if size > 0 else 1.0)
    weight_ED = torch.linalg.solve(xx_DD, xt_DE).t()
    return weight_ED, mean_E - weight_ED @ (mean_D + origin_D)
