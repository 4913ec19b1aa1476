"""Tier T0: is each row of each expert the dense row that it was made from?

Shape suffixes: E experts, I neurons of an expert, D d_model, O d_out.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import torch

from upcycle.ir.layer_weights import weights_of
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, Provenance, read_matrices
from upcycle.layers.moe import MoE
from upcycle.targets.onnx.share_weights import bits

ROWS = 1024  # in float64 at a time


def untraced_rows(
    spec: MoESpec,
    layer: MoE,
    origin: Provenance,
    parameters: Mapping[str, torch.Tensor],
    sources: Sequence[Mapping[str, torch.Tensor]] = (),
) -> int:
    """How many neurons of a layer are not their dense neuron, times one factor for each matrix;
    and how many experts have an output bias that is not that of their FFN, times another.

    Bit for bit where the factor is one, else up to the rounding of the product. Padding must be
    zero. Neurons that were drawn anew are not looked at, nor are contractions that were fitted.
    Memory: 1024 rows in float64.

    `origin` has the dense neuron of each neuron, `parameters` the tensors of the dense model by
    name, `sources` those of the models that experts were taken from, if not from the dense one.
    """
    weights = weights_of(layer)
    routed = _matrices(weights.experts)
    groups = []
    if weights.shared is not None:
        groups.append((_matrices(weights.shared), origin.shared_S[None], parameters))
    if sources:
        for e, source in enumerate(spec.source_E):
            one = slice(e, e + 1)
            groups.append(([m[one] for m in routed], origin.expert_EI[one], sources[source]))
    else:
        groups.append((routed, origin.expert_EI, parameters))
    wrong = 0
    if (made_EO := weights.experts.down_bias_EO) is not None:
        bias = str(spec.ffn.contraction.bias)
        held_E = [sources[source] for source in spec.source_E] or [parameters] * len(made_EO)
        dense_EO = torch.stack([held[bias].detach() for held in held_E])
        wrong += int(_is_other(made_EO, dense_EO, _factor(made_EO, dense_EO)).sum())
    for made, neuron_EI, held in groups:
        if not neuron_EI.numel():
            continue
        *ups_FD, down_OF = read_matrices(spec.ffn, held)
        dense = ups_FD if spec.compensate.changes_down else [*ups_FD, down_OF.t()]
        wrong_EI = torch.zeros_like(neuron_EI, dtype=torch.bool)
        for made_EID, dense_FD in zip(made[: len(dense)], dense, strict=True):
            here = neuron_EI.to(dense_FD.device)
            wrong_EI |= _wrong(made_EID, dense_FD, here).to(wrong_EI.device)
        wrong += int((wrong_EI & (neuron_EI >= -1)).sum())
    return wrong


def redrawn_rows(origin: Provenance) -> int:
    """How many neurons of a layer the method changed, so that they cannot be traced."""
    return int((origin.expert_EI == -2).sum())


def lost_neurons(spec: MoESpec, origin: Provenance) -> int:
    """How many neurons of the dense FFN are not exactly once in the layer."""
    neuron_S = torch.cat([origin.expert_EI.flatten(), origin.shared_S])
    times_F = torch.bincount(neuron_S[neuron_S >= 0], minlength=spec.ffn.d_ff)
    return int((times_F != 1).sum())


def _matrices(experts: ExpertWeights) -> list[torch.Tensor]:
    """Each matrix of experts with a row for each neuron, [E, I, D]."""
    width = experts.down_EOI.shape[2]
    return [*torch.split(experts.up_EGD, width, dim=1), experts.down_EOI.transpose(1, 2)]


def _wrong(made_EID: torch.Tensor, dense_FD: torch.Tensor, neuron_EI: torch.Tensor) -> torch.Tensor:
    every_F = torch.arange(len(dense_FD), device=neuron_EI.device)
    is_whole_E = [
        torch.equal(neuron_I, every_F) and _same_bits(made_ID, dense_FD)
        for made_ID, neuron_I in zip(made_EID, neuron_EI, strict=True)
    ]
    wrong_EI = torch.zeros_like(neuron_EI, dtype=torch.bool)
    if all(is_whole_E):
        return wrong_EI
    factor = _factor(made_EID[0], _expected(dense_FD, neuron_EI[0]))
    for expert, start in product(range(len(made_EID)), range(0, made_EID.shape[1], ROWS)):
        some = slice(start, start + ROWS)
        expected = _expected(dense_FD, neuron_EI[expert, some])
        wrong_EI[expert, some] = _is_other(made_EID[expert, some], expected, factor)
    return wrong_EI


def _is_other(made_ID: torch.Tensor, expected_ID: torch.Tensor, factor: float) -> torch.Tensor:
    """Which rows are not the expected ones times the factor, [I] bool."""
    # A factor rounds once on either side.
    allowed = 0.0 if factor == 1 else 2 * torch.finfo(made_ID.dtype).eps
    made = made_ID.double()
    gap = (made - expected_ID.double() * factor).abs()
    return (~(gap <= allowed * made.abs())).any(-1)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two matrices are the same bytes: for copies there is nothing to compute."""
    is_alike = a.dtype == b.dtype and a.device == b.device
    return is_alike and torch.equal(bits(a), bits(b))


def _expected(dense_FD: torch.Tensor, neuron_I: torch.Tensor) -> torch.Tensor:
    return dense_FD[neuron_I.clamp(min=0)].masked_fill((neuron_I < 0)[:, None], 0)


def _factor(made_ID: torch.Tensor, expected_ID: torch.Tensor) -> float:
    """What the largest dense number of the first expert was multiplied with."""
    place = expected_ID.abs().argmax()
    reference = expected_ID.flatten()[place].item()
    return made_ID.flatten()[place].item() / reference if reference else 1.0
