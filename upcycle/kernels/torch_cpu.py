"""Ways to run experts on the CPU, of which a table of costs chooses one for each call.

Shape suffixes: those of `upcycle.kernels`, S visits (pairs of a token and an expert), R rows with
padding, N experts of a chunk, C rows of each of them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn import functional as F

try:
    from upcycle.kernels.compiled import run_compiled as run_compiled
    from upcycle.kernels.compiled import run_routed as run_routed
except ImportError:  # in the file of a converted model, where upcycle is not installed
    run_compiled = run_routed = None  # type: ignore[assignment]

# Nanoseconds for each weight and row of an expert, by the number of rows: one expert for itself,
# and experts side by side in one product; then for one token, whose products are with a vector.
# As `python benchmarks/expert_kernels.py --costs` prints them, on two idle cores.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALONE = (0.21, 0.19, 0.16, 0.069, 0.042, 0.027, 0.019, 0.015, 0.013)
BESIDE = (0.13, 0.086, 0.046, 0.028, 0.019, 0.015, 0.013, 0.012, 0.011)
ONE = 0.21
CALL, ONE_CALL = 50_000.0, 8_000.0  # nanoseconds of the calls for a chunk, and for a vector
MOVE = 1.0  # nanoseconds for each number of a row that is gathered or summed


TILES = 16  # tokens from which tiles of bfloat16 are faster than vectors


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), as torch's products do then."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def suits_tiles(up: torch.Tensor, tokens: int) -> bool:
    """Whether torch's products are faster than the compiled experts, which have no tiles."""
    return tokens >= TILES and up.dtype == torch.bfloat16 and has_tiles()


class KernelWeights(NamedTuple):
    """The experts of a layer, as the kernels read them."""

    up_EGD: torch.Tensor
    up_bias_EG: torch.Tensor | None
    down_EOI: torch.Tensor
    down_bias_EO: torch.Tensor | None
    activate: Callable[[torch.Tensor], torch.Tensor]
    activation: str | None  # its name, if kernels know it
    norm: Callable[[torch.Tensor], torch.Tensor] | None


class Visits(NamedTuple):
    """Which expert each token visits: the pairs whose weight is not zero, token by token."""

    pair_S: Any  # place in [T, K]
    expert_S: Any
    load_E: Any


def visit(
    w: KernelWeights, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts of each token add, weighted, in the way that seems cheapest.

    Arguments and promise are those of `upcycle.kernels.run_experts`.
    """
    is_compiled = run_compiled is not None and not suits_tiles(w.up_EGD, len(x_TD))
    if is_compiled and w.norm is None:
        y_TO = run_compiled(*w[:4], w.activation, x_TD, index_TK, weights_TK)
        if y_TO is not None:
            return y_TO
    if len(x_TD) == 1 and one_by_one(w, weights_TK.shape[1]):
        return one_token(w, x_TD, index_TK, weights_TK).to(x_TD.dtype)
    visits = _visits(index_TK, weights_TK, len(w.up_EGD))
    if not len(visits.pair_S):
        return x_TD.new_zeros(len(x_TD), w.down_EOI.shape[1])
    kernel, chunk = choose(w, visits.load_E, len(x_TD))
    if kernel == "dense":
        y_TO = dense(w, x_TD, index_TK, weights_TK)
    else:
        y_TO = in_chunks(w, x_TD, visits, weights_TK, chunk)
    return y_TO.to(x_TD.dtype)


def _visits(index_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> Visits:
    visited_TK = weights_TK.detach() != 0
    expert_S = index_TK.reshape(-1).numpy()
    # On so few numbers numpy takes a third of the time of torch.
    pair_S = numpy.flatnonzero(visited_TK.numpy())
    if len(pair_S) < len(expert_S):
        expert_S = expert_S[pair_S]
    return Visits(pair_S, expert_S, numpy.bincount(expert_S, minlength=num_experts))


def one_by_one(w: KernelWeights, top_k: int) -> bool:
    """Whether `one_token` is the cheapest for one token; numpy would take longer than to tell."""
    num_experts, d_out, width = w.down_EOI.shape
    size = w.up_EGD.shape[1] * w.up_EGD.shape[2] + d_out * width
    return top_k * (ONE_CALL + size * ONE) <= CALL + num_experts * size * BESIDE[0]


def choose(w: KernelWeights, load_E: Any, tokens: int) -> tuple[str, int]:
    """The cheapest kernel by the table of costs, and for `in_chunks` the experts of a chunk."""
    num_experts, d_out, width = w.down_EOI.shape
    size, row = w.up_EGD[0].numel() + d_out * width, MOVE * (w.up_EGD.shape[2] + d_out)
    alone = size * (load_E * numpy.interp(load_E, ROWS, ALONE)).sum() + row * load_E.sum()
    found = {("in_chunks", 1): numpy.count_nonzero(load_E) * CALL + alone}
    for chunk in {min(4, num_experts), num_experts} - {1}:
        most = numpy.maximum.reduceat(load_E, range(0, num_experts, chunk))
        beside = size * (most * numpy.interp(most, ROWS, BESIDE)).sum() + row * most.sum()
        found["in_chunks", chunk] = numpy.count_nonzero(most) * CALL + chunk * beside
    if w.norm is None and w.up_EGD.is_contiguous():
        summed = MOVE * d_out * min(tokens, 2 * width)
        all_rows = size * tokens * numpy.interp(tokens, ROWS, BESIDE) + summed
        found["dense", 1] = CALL + num_experts * all_rows
    return min(found, key=lambda way: float(found[way]))


def one_token(
    w: KernelWeights, x_1D: torch.Tensor, index_1K: torch.Tensor, weights_1K: torch.Tensor
) -> torch.Tensor:
    """Expert after expert: their weights are read where they are, and once."""
    x_D = x_1D[0].to(w.up_EGD.dtype)
    weight_K = weights_1K[0].to(x_D.dtype)
    y_O = x_D.new_zeros(w.down_EOI.shape[1])
    chosen = zip(index_1K[0].tolist(), weights_1K[0].tolist(), weight_K, strict=True)
    for expert, number, weight in chosen:
        if not number:
            continue
        z_G = torch.mv(w.up_EGD[expert], x_D)
        if w.up_bias_EG is not None:
            z_G = z_G + w.up_bias_EG[expert]
        hidden_I = w.activate(z_G)
        if w.norm is None and w.down_bias_EO is None:
            y_O = torch.addmv(y_O, w.down_EOI[expert], hidden_I * weight)
        else:
            added_O = torch.mv(w.down_EOI[expert], hidden_I)
            if w.down_bias_EO is not None:
                added_O = added_O + w.down_bias_EO[expert]
            y_O = y_O + weight * (added_O if w.norm is None else w.norm(added_O))
    return y_O[None]


def in_chunks(
    w: KernelWeights, x_TD: torch.Tensor, visits: Visits, weights_TK: torch.Tensor, chunk: int
) -> torch.Tensor:
    """`chunk` experts at a time, side by side in one product, each with as many rows as the most
    visited one of them has tokens."""
    tokens, top_k = weights_TK.shape
    first_row_E, most = _rows(visits.load_E, chunk)
    order_S = visits.expert_S.astype(numpy.uint16).argsort(kind="stable")
    rank_S = numpy.arange(len(order_S))
    # A row of padding reads token 0, and its result is not read.
    token_R = numpy.zeros(sum(min(chunk, len(w.up_EGD) - e) * n for e, n in most), numpy.int64)
    row_S = numpy.empty_like(rank_S)
    before_E = visits.load_E.cumsum() - visits.load_E
    row_S[order_S] = rank_S + (first_row_E - before_E)[visits.expert_S[order_S]]
    token_S = visits.pair_S // top_k
    token_R[row_S] = token_S
    x_RD = x_TD.index_select(0, torch.from_numpy(token_R))
    parts, start = [], 0
    for expert, rows in most:
        count = min(chunk, len(w.up_EGD) - expert)
        x_CD = x_RD[start : start + count * rows]
        start += count * rows
        parts.append(_expert(w, expert, x_CD) if count == 1 else _chunk(w, expert, count, x_CD))
    y_RO = parts[0] if len(parts) == 1 else torch.cat(parts)
    weight_S = weights_TK.reshape(-1)
    if len(token_S) < len(weight_S):
        weight_S = weight_S[torch.from_numpy(visits.pair_S)]
    y_TO: torch.Tensor = F.embedding_bag(
        torch.from_numpy(row_S),
        y_RO,
        torch.from_numpy(numpy.searchsorted(token_S, numpy.arange(tokens))),
        mode="sum",
        per_sample_weights=weight_S.to(y_RO.dtype),
    )
    return y_TO


def _rows(load_E: Any, chunk: int) -> tuple[Any, list[tuple[int, int]]]:
    """The first row of each expert, and of each chunk that is visited its first expert and C."""
    starts = numpy.arange(0, len(load_E), chunk)
    most = numpy.maximum.reduceat(load_E, starts)
    rows_E = most.repeat(chunk)[: len(load_E)]
    visited = [(e, n) for e, n in zip(starts.tolist(), most.tolist(), strict=True) if n]
    return rows_E.cumsum() - rows_E, visited


def _expert(w: KernelWeights, expert: int, x_CD: torch.Tensor) -> torch.Tensor:
    bias_G = None if w.up_bias_EG is None else w.up_bias_EG[expert]
    bias_O = None if w.down_bias_EO is None else w.down_bias_EO[expert]
    hidden_CI = w.activate(F.linear(x_CD, w.up_EGD[expert], bias_G))
    y_CO = F.linear(hidden_CI, w.down_EOI[expert], bias_O)
    return y_CO if w.norm is None else w.norm(y_CO)


def _chunk(w: KernelWeights, first: int, count: int, x_RD: torch.Tensor) -> torch.Tensor:
    chosen = slice(first, first + count)
    x_NCD = x_RD.view(count, -1, x_RD.shape[1])
    z_NCG = x_NCD @ w.up_EGD[chosen].mT
    if w.up_bias_EG is not None:
        z_NCG = z_NCG + w.up_bias_EG[chosen, None]
    y_NCO = w.activate(z_NCG) @ w.down_EOI[chosen].mT
    if w.down_bias_EO is not None:
        y_NCO = y_NCO + w.down_bias_EO[chosen, None]
    y_RO = y_NCO.flatten(0, 1)
    return y_RO if w.norm is None else w.norm(y_RO)


def dense(
    w: KernelWeights, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """All experts as one FFN whose hidden numbers are weighted."""
    num_experts, d_out, width = w.down_EOI.shape
    bias_G = None if w.up_bias_EG is None else w.up_bias_EG.flatten()
    z_TG = F.linear(x_TD, w.up_EGD.flatten(0, 1), bias_G)
    hidden_TEI = w.activate(z_TG.view(len(x_TD), num_experts, -1))
    # Where the weight is zero the index may be that of an expert of another process.
    index_TK = index_TK.clamp(0, num_experts - 1)
    weights_TE = hidden_TEI.new_zeros(len(x_TD), num_experts)
    weights_TE = weights_TE.scatter_add(1, index_TK, weights_TK.to(hidden_TEI.dtype))
    hidden_TEI = hidden_TEI * weights_TE[:, :, None]
    if len(x_TD) < 2 * width:
        y_TO = (hidden_TEI.transpose(0, 1) @ w.down_EOI.mT).sum(0)
    else:
        down_FO = w.down_EOI.transpose(1, 2).reshape(-1, d_out)
        y_TO = hidden_TEI.flatten(1) @ down_FO
    return y_TO if w.down_bias_EO is None else y_TO + weights_TE @ w.down_bias_EO
