"""How the Triton kernels of the experts are launched: tiles, memory, grids.

Shape suffixes: those of `upcycle.kernels.triton`, B blocks, R rows of all blocks, N columns of a
result, X depth of a product.
"""

from contextlib import nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from upcycle.errors import UnsupportedError


class Tiles(NamedTuple):
    """How `grouped_gemm` cuts its work: rows, columns and depth of a tile, neighbours, threads."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


def choose_tiles(rows: float, dtype: torch.dtype, *, gated: bool) -> Tiles:
    """The tiles for experts with `rows` tokens on average, for GPUs like the H100.

    Few rows: the weights are read once, so tiles are flat and several loads are under way. Many
    rows: 128 x 256 products for the tensor cores; a gate and its partner are half of that each.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles, four bytes a number
        return Tiles(16 if rows <= 12 else 64, 32 if gated else 64, 32, 8, 4, 3)
    height = next((height for height in (16, 32, 64) if 1.5 * rows <= height), 128)
    if height <= 32:
        return Tiles(height, 64, 128, 4, 4, 4 if gated else 5)
    if height == 64:
        return Tiles(64, 64 if gated else 128, 64, 8, 4, 4)
    return Tiles(128, 128 if gated else 256, 64, 8, 8, 4)


def fit_stages(tiles: Tiles, size: int, room: int, *, gated: bool) -> Tiles:
    """Fewer stages where `room` bytes of shared memory do not hold as many; `size` of a number."""
    stage = (tiles.rows + tiles.columns * (2 if gated else 1)) * tiles.depth * size
    return tiles._replace(stages=max(2, min(tiles.stages, room // stage)))


@cache
def _source() -> ModuleType:
    try:
        return import_module("upcycle.kernels.triton.source")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise UnsupportedError(
            'experts_implementation="upcycle_triton" needs Triton, which is not installed: '
            'pip install triton (Linux), or choose "grouped_mm"'
        ) from error


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_interpreted() -> bool:
    """TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, slowly."""
    return not isinstance(_source().grouped_gemm, import_module("triton").JITFunction)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one block of threads may have; of an H100 where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def launch(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EGD: torch.Tensor,
    down_EOI: torch.Tensor,
    up_bias_EG: torch.Tensor | None,
    down_bias_EO: torch.Tensor | None,
    act: str,
    gated: bool,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> torch.Tensor:
    """Run the kernels; see `upcycle.kernels.triton.fused_experts`.

    The weights may be strided. `tiles` of the two products, with equal `rows`, replace the choice
    by shape.
    """
    source = _source()
    experts, chosen = len(up_EGD), index_TK.shape[1]
    slots = index_TK.numel()
    width = down_EOI.shape[1]
    hidden_SI = x_TD.new_empty(slots, up_EGD.shape[1] // (2 if gated else 1))
    part_SO = x_TD.new_empty(slots, width)
    y_TO = x_TD.new_empty(len(x_TD), width)
    if not slots:
        return y_TO.zero_()
    index_S, router_S = index_TK.contiguous().view(-1), weights_TK.contiguous().view(-1)
    wide, flat = tiles or _tiles(slots / min(slots, experts), x_TD, gated=gated)
    # A token's experts differ, so that nothing is gained by sorting one token.
    placed = len(x_TD) > 1
    with torch.cuda.device(x_TD.device) if x_TD.is_cuda else nullcontext():
        lists = _place(index_S, router_S, experts, wide.rows) if placed else (index_S,) * 3
        common = (index_S, router_S, *lists, slots, experts)
        x_TD = x_TD.contiguous()
        first = {"PER_ROW": chosen, "ACT": act, "GATED": gated, "WEIGHTED": False}
        second = {"PER_ROW": 1, "ACT": "none", "GATED": False, "WEIGHTED": True}
        _gemm(x_TD, up_EGD, up_bias_EG, hidden_SI, common, wide, first)
        _gemm(hidden_SI, down_EOI, down_bias_EO, part_SO, common, flat, second)
        grid = (len(x_TD), -(-width // 1024))
        source.sum_slots[grid](part_SO, index_S, router_S, y_TO, experts, width, K=chosen, BN=1024)
    return y_TO


def _tiles(rows: float, x_TD: torch.Tensor, *, gated: bool) -> tuple[Tiles, Tiles]:
    """The tiles of the two products on the device of `x_TD`."""
    size, room = x_TD.element_size(), _shared_memory(x_TD.device)
    wide = choose_tiles(rows, x_TD.dtype, gated=gated)
    flat = choose_tiles(rows, x_TD.dtype, gated=False)
    return fit_stages(wide, size, room, gated=gated), fit_stages(flat, size, room, gated=False)


def _most_blocks(slots: int, experts: int, rows: int) -> int:
    """Each expert has at most one block that is not full."""
    return slots // rows + min(slots, experts)


def _place(
    index_S: torch.Tensor, router_S: torch.Tensor, experts: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slot numbers in blocks, the expert of each block, the number of blocks."""
    slots, source = len(index_S), _source()
    most = _most_blocks(slots, experts, rows)
    step = min(4096, max(128, 1 << (slots - 1).bit_length()))
    count_E, slot_R, expert_B, blocks = (
        index_S.new_empty(size, dtype=torch.int32) for size in (experts, most * rows, most, 1)
    )
    source.count_slots[(experts,)](index_S, router_S, count_E, slots, STEP=step)
    source.place_slots[(experts,)](
        index_S,
        router_S,
        count_E,
        slot_R,
        expert_B,
        blocks,
        slots,
        experts,
        POWER=1 << (experts - 1).bit_length(),
        STEP=step,
        BM=rows,
    )
    return slot_R, expert_B, blocks


def _gemm(
    a_XD: torch.Tensor,
    weight_END: torch.Tensor,
    bias_EN: torch.Tensor | None,
    out_SN: torch.Tensor,
    common: tuple[Any, ...],
    tiles: Tiles,
    what: dict[str, Any],
) -> None:
    """Launch `grouped_gemm`: enough programs for the most blocks that there can be."""
    index_S, router_S, slot_R, expert_B, blocks, slots, experts = common
    placed = slot_R is not index_S
    most = _most_blocks(slots, experts, tiles.rows) if placed else slots
    columns, depth = out_SN.shape[1], a_XD.shape[1]
    _source().grouped_gemm[(most * -(-columns // tiles.columns),)](
        a_XD,
        weight_END,
        a_XD if bias_EN is None else bias_EN.contiguous(),
        out_SN,
        index_S,
        router_S,
        slot_R,
        expert_B,
        blocks,
        slots,
        experts,
        columns,
        depth,
        *weight_END.stride(),
        HAS_BIAS=bias_EN is not None,
        PLACED=placed,
        EVEN=depth % tiles.depth == 0,
        BM=tiles.rows,
        BN=tiles.columns,
        BD=tiles.depth,
        GROUP=tiles.group,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **what,
    )
