"""Tier T0: is each row of each expert the dense row that it was made from?

Shape suffixes: E experts, I neurons of an expert, D d_model, O d_out.
"""

from collections.abc import Iterator, Mapping
from itertools import product

import torch

from upcycle.ffn import FFN
from upcycle.moe import MoE

ROWS = 1024  # in float64 at a time


def untraced_rows(
    ffn: FFN, layer: MoE, neuron_EI: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> int:
    """How many expert neurons are not their dense neuron, times one factor for each matrix.

    Bit for bit where the factor is one, else up to the rounding of the product. Padding must be
    zero. Memory: 1024 rows in float64.

    Args:
        ffn: the dense FFN.
        layer: what it became.
        neuron_EI: the dense neuron of each expert neuron, [E, I]; -1 for padding.
        parameters: of the dense model, by name.
    """
    wrong_EI = torch.zeros_like(neuron_EI, dtype=torch.bool)
    for made_EID, dense_FD in _matrices(ffn, layer, parameters):
        wrong_EI |= _wrong(made_EID, dense_FD, neuron_EI.to(dense_FD.device)).to(wrong_EI.device)
    return int(wrong_EI.sum())


def _matrices(
    ffn: FFN, layer: MoE, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each matrix of the experts [E, I, D] with the dense one [F, D]: a row per neuron."""
    experts = layer.experts
    up_EGD, width = experts.up_EGD.detach(), experts.intermediate_dim
    for i, projection in enumerate(ffn.expansions):
        stored = parameters[projection.weight].detach()
        stored = (stored.t() if projection.transposed else stored).flatten(1)
        yield up_EGD[:, i * width : (i + 1) * width], stored[slice(*projection.rows)]
    down = parameters[ffn.contraction.weight].detach()
    columns_FO = down if ffn.contraction.transposed else down.flatten(1).t()
    columns = slice(*ffn.contraction.columns or (None,))
    yield experts.down_proj.detach().transpose(1, 2), columns_FO[columns]


def _wrong(made_EID: torch.Tensor, dense_FD: torch.Tensor, neuron_EI: torch.Tensor) -> torch.Tensor:
    factor = _factor(made_EID[0], _expected(dense_FD, neuron_EI[0]))
    eps = torch.finfo(made_EID.dtype).eps
    allowed = 0.0 if factor == 1 else 2 * eps  # a factor rounds once on either side
    wrong_EI = torch.empty_like(neuron_EI, dtype=torch.bool)
    for expert, start in product(range(len(made_EID)), range(0, made_EID.shape[1], ROWS)):
        some = slice(start, start + ROWS)
        made = made_EID[expert, some].double()
        gap = (made - _expected(dense_FD, neuron_EI[expert, some]).double() * factor).abs()
        wrong_EI[expert, some] = (~(gap <= allowed * made.abs())).any(-1)
    return wrong_EI


def _expected(dense_FD: torch.Tensor, neuron_I: torch.Tensor) -> torch.Tensor:
    return dense_FD[neuron_I.clamp(min=0)].masked_fill((neuron_I < 0)[:, None], 0)


def _factor(made_ID: torch.Tensor, expected_ID: torch.Tensor) -> float:
    """What the largest dense number of the first expert was multiplied with."""
    place = expected_ID.abs().argmax()
    reference = expected_ID.flatten()[place].item()
    return made_ID.flatten()[place].item() / reference if reference else 1.0
