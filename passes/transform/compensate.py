"""Compensate: what stands in for the neurons that a token does not visit, fitted in closed form.

With h the hidden activations of the dense FFN and c_j the sum of the weights of a token's experts
that hold neuron j, the layer gives ``(h * c) D + b`` and the dense FFN ``h D + b``. Weighted ridge
regression on the calibration tokens changes D and b and adds a thin linear map of the token so that
the two are close in the mean. All of it is folded into weights that the layer has anyway, but for
the linear map.

Shape suffixes: T tokens, D d_model, O d_out, E experts, F neurons, I neurons of an expert, R rank,
P predictors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import ExpertWeights, FFNWeights, MoEWeights
from upcycle.passes.calibrate.usage import routed_tokens
from upcycle.passes.experts.split import membership
from upcycle.passes.transform.least_squares import Sums, best_penalty, input_basis, solve, squares
from upcycle.recipe.schema import Compensate

BLOCK, EVERY = 512, 6  # of each six blocks of tokens the last one is held out to choose the penalty
FREE = 0.1  # the linear map and the offset are penalised less than the neurons, by this factor


def compensate(made: MoEWeights, ffn: FFNWeights, spec: MoESpec, data: FFNInputs) -> MoEWeights:
    """Fit what ``spec.compensate`` asks for; approximate.

    - ``refit``: D, towards the dense one. A neuron keeps one column however many experts hold it.
    - ``low_rank``: ``U V x`` of that rank, fitted together with D if both are asked for.
    - ``mean``: an offset, together with those.
    - ``scale``, ``affine``: one factor, or a factor and an offset for each output, on the result.

    A token counts with the inverse of its squared output, and half of that at the median: otherwise
    the few tokens with huge outputs that language models have would decide alone.

    The experts of `made` are sets of neurons of `ffn`. Memory: two float32 matrices of
    (F + D + 1)^2, for one FFN.

    Returns:
        The layer with other contractions, output bias and low-rank term; `made` if nothing is
        asked for. Its figures, unless only ``scale`` or ``affine`` is: the ``penalty``, and the
        square error without and with what was fitted, ``error_before`` and ``error_after``,
        relative to the square of the output, on tokens that were held out.

    Source:
        after the closed-form repair of pruned networks, e.g. An et al., "FLAP", 2023,
        https://arxiv.org/abs/2312.11983
    """
    wanted = spec.compensate
    if not wanted.any:
        return made
    ffn = ffn.to(torch.float32)
    stream = _Stream(made, ffn, spec, data)
    down_OF, bias_O, thin = ffn.down_OF, torch.zeros(len(ffn.down_OF)), None
    figures: Mapping[str, float] = {}
    if wanted.refit or spec.low_rank or wanted.mean:
        down_OF, bias_O, thin, figures = _fit(stream, spec)
    if wanted.scale or wanted.affine:
        gain_O, offset_O = _affine(stream, down_OF, bias_O, thin, each=wanted.affine)
        down_OF = down_OF * gain_O[:, None]
        bias_O = bias_O * gain_O + offset_O
        thin = None if thin is None else (thin[0], thin[1] * gain_O[:, None])
    dtype = made.experts.down_EOI.dtype
    dense_bias_O = made.output_bias_O
    has_bias = dense_bias_O is not None or wanted.mean or wanted.affine
    if dense_bias_O is not None:
        bias_O = bias_O + dense_bias_O.float()
    return replace(
        made,
        experts=_with_down(made.experts, down_OF),
        shared=None if made.shared is None else _with_down(made.shared, down_OF),
        output_bias_O=bias_O.to(dtype) if has_bias else None,
        low_rank=None if thin is None else (thin[0].to(dtype), thin[1].to(dtype)),
        figures=figures,
    )


def _with_down(experts: ExpertWeights, down_OF: torch.Tensor) -> ExpertWeights:
    """The same experts with the columns of another contraction."""
    neuron_EI = experts.neuron_EI
    down_EIO = down_OF.t()[neuron_EI.clamp(min=0)]
    down_EIO[neuron_EI < 0] = 0
    down_EOI = down_EIO.transpose(1, 2).contiguous().to(experts.down_EOI.dtype)
    return replace(experts, down_EOI=down_EOI)


class _Stream:
    """The calibration tokens as the fits read them, computed again on each pass.

    Some at a time: inputs [t, D], visited activations [t, F], dense outputs [t, O], weights [t].
    """

    def __init__(self, made: MoEWeights, ffn: FFNWeights, spec: MoESpec, data: FFNInputs) -> None:
        self.ffn = replace(ffn, down_bias_O=None)
        d_ff = ffn.down_OF.shape[1]
        self._member_EF = membership(made.experts.neuron_EI, d_ff)
        self._always_F = torch.zeros(d_ff)
        if made.shared is not None:
            self._always_F = membership(made.shared.neuron_EI, d_ff)[0]
        plain = replace(spec, compensate=Compensate())
        self._routed = partial(routed_tokens, plain, ffn, made, data)
        sizes = [(h_TF @ ffn.down_OF.t()).square().sum(1) for _, h_TF in data.hidden(ffn)]
        self._median = float(torch.cat(sizes).median()) or 1.0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        for x_TD, h_TF, weights_TE in self._routed():
            visited_TF = h_TF * (weights_TE @ self._member_EF + self._always_F)
            y_TO = h_TF @ self.ffn.down_OF.t()
            yield x_TD, visited_TF, y_TO, 1 / (y_TO.square().sum(1) + self._median)


Thin = tuple[torch.Tensor, torch.Tensor] | None


def _fit(
    stream: _Stream, spec: MoESpec
) -> tuple[torch.Tensor, torch.Tensor, Thin, dict[str, float]]:
    """The contraction [O, F], the offset [O] and the linear map, fitted together; the figures."""
    wanted, ffn, rank = spec.compensate, stream.ffn, spec.low_rank
    d_out, d_ff = ffn.down_OF.shape
    d_model = ffn.up_MFD.shape[-1]
    neurons, inputs = (d_ff if wanted.refit else 0), (d_model if rank else 0)
    count = neurons + inputs + int(wanted.mean)
    fit, held_out = Sums.zeros(count, d_out), Sums.zeros(count, d_out)
    place, held_out_size = 0, 0.0
    for x_TD, visited_TF, y_TO, weight_T in stream:
        parts = [visited_TF] * bool(neurons) + [x_TD] * bool(inputs)
        parts += [torch.ones(len(x_TD), 1)] * wanted.mean
        z_TP = torch.cat(parts, dim=1)
        gap_TO = y_TO - visited_TF @ ffn.down_OF.t()
        for start in range(0, len(z_TP), BLOCK):
            some = slice(start, start + BLOCK)
            is_held_out = place % EVERY == EVERY - 1
            sums = held_out if is_held_out else fit
            sums.add(z_TP[some], gap_TO[some], weight_T[some])
            if is_held_out:
                held_out_size += squares(y_TO[some], weight_T[some])
            place += 1
    relative_P = torch.ones(count)
    relative_P[neurons:] = FREE
    penalty = wanted.ridge[0]
    if place >= EVERY and len(wanted.ridge) > 1:
        penalty = best_penalty(fit, held_out, wanted.ridge, relative_P)
    figures = {"penalty": penalty}
    if held_out_size:
        figures["error_before"] = held_out.yy / held_out_size
        beta_PO, _ = _solution(fit, penalty * relative_P, neurons, rank, inputs)
        figures["error_after"] = held_out.error(beta_PO) / held_out_size
    beta_PO, thin = _solution(fit + held_out, penalty * relative_P, neurons, rank, inputs)
    down_OF = ffn.down_OF + beta_PO[:neurons].t() if neurons else ffn.down_OF
    bias_O = beta_PO[-1] if wanted.mean else torch.zeros(d_out)
    return down_OF, bias_O, thin, figures


def _solution(
    sums: Sums, penalty_P: torch.Tensor, neurons: int, rank: int, inputs: int
) -> tuple[torch.Tensor, Thin]:
    """The coefficients [P, O] of neurons, inputs and offset; those of the inputs have `rank`."""
    if not inputs:
        return solve(sums, penalty_P), None
    count = len(penalty_P)
    these, rest = slice(neurons, neurons + inputs), count - neurons - inputs
    thin_DR = input_basis(solve(sums, penalty_P)[these], sums.zz_PP[these, these], rank)
    blocks = (torch.eye(neurons), thin_DR, torch.eye(rest))
    basis_PQ = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    penalty_Q = torch.cat([penalty_P[:neurons], penalty_P[-1].expand(rank + rest)])
    beta_QO = solve(sums.through(basis_PQ), penalty_Q)
    map_RO = beta_QO[neurons : neurons + rank]
    return basis_PQ @ beta_QO, (thin_DR.t().contiguous(), map_RO.t().contiguous())


def _affine(
    stream: _Stream, down_OF: torch.Tensor, bias_O: torch.Tensor, thin: Thin, *, each: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors and offsets [O] that bring the outputs of the layer nearest to the dense ones."""
    moments = torch.zeros(5, len(down_OF))  # of weights, ours, theirs, ours^2, ours * theirs
    for x_TD, visited_TF, y_TO, weight_T in stream:
        ours_TO = visited_TF @ down_OF.t() + bias_O
        if thin is not None:
            ours_TO = ours_TO + x_TD @ thin[0].t() @ thin[1].t()
        rows = (torch.ones_like(ours_TO), ours_TO, y_TO, ours_TO**2, ours_TO * y_TO)
        moments += torch.stack([(weight_T[:, None] * row_TO).sum(0) for row_TO in rows])
    weight_O, ours_O, theirs_O, square_O, product_O = moments
    if not each:
        gain = product_O.sum() / square_O.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return gain.expand(len(down_OF)), torch.zeros(len(down_OF))
    mean_O, target_O = ours_O / weight_O, theirs_O / weight_O
    variance_O = (square_O / weight_O - mean_O**2).clamp(min=torch.finfo(torch.float32).tiny)
    gain_O = (product_O / weight_O - mean_O * target_O) / variance_O
    return gain_O, target_O - gain_O * mean_O
