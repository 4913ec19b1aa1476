"""Round the weights of experts to few bits, in the layout of the kernel ``QMoE``.

Symmetric, in groups along a row, without calibration data, after Kim et al., "FineQuant", 2023,
https://arxiv.org/abs/2308.09723. Each expert's matrix has a group size of its own; the kernel has
one size for all matrices of a layer, so it is the smallest of them.

Shape suffixes: E experts, N rows, K inputs of a row, G groups of a row, P packed bytes of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Block = str | int
SMALLEST = 16  # the kernel's smallest group; it takes powers of two
_SHRINKS = 0.9  # a halved group has to have at most this part of the range to be worth its scales


@dataclass(frozen=True)
class Quantised:
    """A stack of matrices, of which an element is ``(q - 2 ** (bits - 1)) * scale``.

    Attributes:
        packed: [E, N, P] uint8; of two 4-bit numbers in a byte the first is the low one.
        scale: [E, N] if `block` is None, one for each row, else [E, N, G]; float32.
        bits: 8 or 4.
        block: inputs of one group, of which the last may be shorter.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    bits: int
    block: int | None


def quantise(stacks: Sequence[torch.Tensor], bits: int, block: Block) -> list[Quantised]:
    """Round stacks of matrices [E, N, K] float32, which one kernel reads, to 8 or 4 bits.

    Every element is off by at most half the scale of its group, which is the group's largest
    magnitude over ``2 ** (bits - 1) - 1``. `block` is ``row``, a group size, or ``adaptive``; for
    4 bits K is even.
    """
    size = None if block == "row" else _common(stacks, block)
    return [_in_groups(stack, bits, size) for stack in stacks]


def _common(stacks: Sequence[torch.Tensor], block: Block) -> int | None:
    """The group size of all matrices, or None for whole rows, as for rows below `SMALLEST`."""
    widths = [stack.shape[2] for stack in stacks]
    largest: int = min(2 ** int(math.log2(width)) for width in widths)
    if largest < SMALLEST:
        return None
    if isinstance(block, int):
        return min(block, largest)
    groups = [(adaptive_group(matrix), matrix.shape[1]) for stack in stacks for matrix in stack]
    if all(group == row for group, row in groups):
        return None
    # The kernel is fast where the block divides all widths.
    even = min(math.gcd(width, 2**30) for width in widths)
    return max(min(even, *(group for group, _ in groups)), SMALLEST)


def _in_groups(weight_ENK: torch.Tensor, bits: int, block: int | None) -> Quantised:
    limit, columns = 2 ** (bits - 1), weight_ENK.shape[2]
    group = block or columns
    scale_ENG = largest_of(weight_ENK, group) / (limit - 1)
    scale_ENG = torch.where(scale_ENG == 0, torch.ones_like(scale_ENG), scale_ENG)
    steps = (weight_ENK / spread(scale_ENG, group, columns)).round().clamp(1 - limit, limit - 1)
    packed = _pack((steps + limit).to(torch.uint8), bits)
    scale = scale_ENG if block else scale_ENG[..., 0]
    return Quantised(packed, scale.contiguous(), bits, block)


def dequantise(quantised: Quantised, columns: int) -> torch.Tensor:
    """The rounded matrices [E, N, K] in float32; `columns` is K."""
    zero = 2 ** (quantised.bits - 1)
    q_ENK: torch.Tensor = _unpack(quantised.packed, quantised.bits).float() - zero
    return q_ENK * steps_of(quantised, columns)


def steps_of(quantised: Quantised, columns: int) -> torch.Tensor:
    """The distance of neighbouring values, for each element or, [E, N, 1], for each row."""
    if quantised.block is None:
        return quantised.scale[..., None]
    return spread(quantised.scale, quantised.block, columns)


def adaptive_group(weight_NK: torch.Tensor) -> int:
    """The group size that the outliers of a matrix ask for.

    It is halved from whole rows on as long as each halving shrinks the mean range of a group to 0.9
    or less; so a matrix whose magnitudes are alike keeps one scale for each row.
    """
    columns = weight_NK.shape[1]
    group, mean = columns, largest_of(weight_NK, columns).mean()
    powers = (2**power for power in range((columns - 1).bit_length() - 1, 0, -1))
    for smaller in (n for n in powers if n >= SMALLEST and columns % n == 0):
        shrunk = largest_of(weight_NK, smaller).mean()
        if shrunk > mean * _SHRINKS ** math.log2(group / smaller):
            break
        group, mean = smaller, shrunk
    return group


def largest_of(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The largest magnitude of each group, [..., K] -> [..., G]."""
    padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[-1] % group))
    largest: torch.Tensor = padded.reshape(*weight.shape[:-1], -1, group).amax(-1)
    return largest


def spread(scale: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """The scale of each element, [..., K]."""
    return scale.repeat_interleave(group, dim=-1)[..., :columns]


def _pack(q_ENK: torch.Tensor, bits: int) -> torch.Tensor:
    return q_ENK if bits == 8 else q_ENK[..., 0::2] | (q_ENK[..., 1::2] << 4)


def _unpack(packed_ENP: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed_ENP
    return torch.stack([packed_ENP & 15, packed_ENP >> 4], dim=-1).flatten(2)
