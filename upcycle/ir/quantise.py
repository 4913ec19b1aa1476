"""Round weights to few bits: symmetric, in groups along a row, without calibration data.

After Kim et al., "FineQuant", 2023, https://arxiv.org/abs/2308.09723. Each matrix asks for a group
size of its own; where a file has one size for several matrices, that is the smallest of them.

Shape suffixes: E matrices, N rows, K inputs of a row, G groups of a row, P packed bytes of a row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Block = str | int
SMALLEST = 16  # inputs of a group; the kernels of ONNX Runtime take powers of two from here on
ALPHA = 0.9  # a halved group has to have less than this part of the range to be worth its scales


@dataclass(frozen=True)
class Quantised:
    """A stack of matrices, of which an element is ``(q - 2 ** (bits - 1)) * scale``.

    Attributes:
        packed: [E, N, P] uint8; of two 4-bit numbers in a byte the first is the low one.
        scale: [E, N] if `block` is None, one for each row, else [E, N, G]; in the type of the
            matrices.
        bits: 8 or 4.
        block: inputs of one group, of which the last may be shorter.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    bits: int
    block: int | None


def quantise(stacks: Sequence[torch.Tensor], bits: int, block: Block) -> list[Quantised]:
    """Round stacks of matrices [E, N, K], which one kernel reads, to 8 or 4 bits.

    Every element is off by at most half the scale of its group, which is the group's largest
    magnitude over ``2 ** (bits - 1) - 1``, rounded up in the type of the matrices. `block` is
    ``row``, a group size, or ``adaptive``.
    """
    size = None if block == "row" else _size(stacks, block)
    return [_in_groups(stack, bits, size) for stack in stacks]


def _size(stacks: Sequence[torch.Tensor], block: Block) -> int | None:
    """The group size of all matrices, or None for whole rows, as for rows below `SMALLEST`."""
    largest: int = min(2 ** int(math.log2(stack.shape[2])) for stack in stacks)
    if largest < SMALLEST:
        return None
    if isinstance(block, int):
        return min(block, largest)
    found = common_group(matrix for stack in stacks for matrix in stack)
    return None if found is None else max(found, SMALLEST)


def _in_groups(weight_ENK: torch.Tensor, bits: int, block: int | None) -> Quantised:
    limit, columns = 2 ** (bits - 1), weight_ENK.shape[2]
    group, dtype = block or columns, weight_ENK.dtype
    weight_ENK = weight_ENK.to(torch.promote_types(dtype, torch.float32))
    scale_ENG = _rounded_up(largest_of(weight_ENK, group) / (limit - 1), dtype)
    steps = weight_ENK / spread(scale_ENG.to(weight_ENK), group, columns)
    q_ENK = steps.round().clamp(1 - limit, limit - 1) + limit
    scale = scale_ENG if block else scale_ENG[..., 0]
    return Quantised(_pack(q_ENK.to(torch.uint8), bits), scale.contiguous(), bits, block)


def _rounded_up(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a narrow type not below what it was, or the largest element would be cut; ones for 0."""
    narrow = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype)
    above = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    return torch.where(narrow.to(scale) < scale, above, narrow)


def dequantise(quantised: Quantised, columns: int) -> torch.Tensor:
    """The rounded matrices [E, N, K] in float32; `columns` is K."""
    zero = 2 ** (quantised.bits - 1)
    q_ENK: torch.Tensor = _unpack(quantised.packed, quantised.bits)[..., :columns].float() - zero
    return q_ENK * steps_of(quantised, columns)


def steps_of(quantised: Quantised, columns: int) -> torch.Tensor:
    """The distance of neighbouring values, for each element or, [E, N, 1], for each row."""
    scale = quantised.scale.float()
    if quantised.block is None:
        return scale[..., None]
    return spread(scale, quantised.block, columns)


def adaptive_group(
    weight_NK: torch.Tensor, *, alpha: float = ALPHA, smallest: int = SMALLEST
) -> int:
    """The group size that the outliers of a matrix ask for.

    It is halved from whole rows on as long as each halving shrinks the mean range of a group to
    less than `alpha` of it; so a matrix whose magnitudes are alike keeps one scale for each row.
    Groups are powers of two, which kernels read, from `smallest` on, and divide the rows: of rows
    of 576 the first one has 64.
    """
    columns = weight_NK.shape[1]
    group, mean = columns, largest_of(weight_NK, columns).float().mean()
    powers = (2**power for power in range((columns - 1).bit_length() - 1, 0, -1))
    for smaller in (n for n in powers if n >= smallest and columns % n == 0):
        shrunk = largest_of(weight_NK, smaller).float().mean()
        if not shrunk < mean * alpha ** math.log2(group / smaller):
            break
        group, mean = smaller, shrunk
    return group


def common_group(
    matrices: Iterable[torch.Tensor], *, alpha: float = ALPHA, smallest: int = SMALLEST
) -> int | None:
    """The smallest group that one of the matrices [N, K] asks for; None for whole rows.

    It divides the rows of all, which are the blocks that kernels are fast with, and is below
    `smallest` where nothing else does.
    """
    found = [(adaptive_group(m, alpha=alpha, smallest=smallest), m.shape[1]) for m in matrices]
    if all(group == row for group, row in found):
        return None
    even = min(math.gcd(row, 2**30) for _, row in found)
    return min(even, *(group for group, _ in found))


def largest_of(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The largest magnitude of each group, [..., K] -> [..., G]."""
    if rest := weight.shape[-1] % group:
        weight = torch.nn.functional.pad(weight, (0, group - rest))
    groups = weight.reshape(*weight.shape[:-1], -1, group)
    largest: torch.Tensor = torch.linalg.vector_norm(groups, torch.inf, dim=-1)
    return largest


def spread(scale: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """The scale of each element, [..., K]."""
    return scale.repeat_interleave(group, dim=-1)[..., :columns]


def _pack(q_ENK: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return q_ENK
    q_ENK = torch.nn.functional.pad(q_ENK, (0, q_ENK.shape[-1] % 2))
    return q_ENK[..., 0::2] | (q_ENK[..., 1::2] << 4)


def _unpack(packed_ENP: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed_ENP
    return torch.stack([packed_ENP & 15, packed_ENP >> 4], dim=-1).flatten(2)
