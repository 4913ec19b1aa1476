"""Rounding to few bits: how far it may be off, how large groups are, the bytes of kernels."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.ir.quantise import (
    SMALLEST,
    adaptive_group,
    common_group,
    dequantise,
    quantise,
    steps_of,
)
from upcycle.targets.compressed import words

EPS = torch.finfo(torch.float32).eps


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(columns: int = 256) -> torch.Tensor:
    """Every 64th input is 30 times as large as the others."""
    matrix = drawn(8, columns)
    matrix[:, ::64] *= 30
    return matrix


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([8, 4]),
    block=st.sampled_from(["row", "adaptive", 16, 32, 64, 256]),
    experts=st.integers(1, 3),
    rows=st.integers(1, 5),
    pairs=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_no_element_is_off_by_more_than_half_a_step(
    bits, block, experts, rows, pairs, seed
) -> None:
    stack = drawn(experts, rows, 2 * pairs, seed=seed)
    (found,) = quantise([stack], bits, block)
    assert found.packed.dtype == torch.uint8
    assert found.packed.shape == (experts, rows, 2 * pairs * bits // 8)
    back = dequantise(found, 2 * pairs)
    size = found.block or 2 * pairs
    step = found.scale if found.block else found.scale[..., None]
    step = step.repeat_interleave(size, dim=-1)[..., : 2 * pairs]
    assert ((back - stack).abs() <= step * (0.5 + 2**bits * EPS)).all()
    largest = (2 ** (bits - 1) - 1) * step
    assert (stack.abs() <= largest * (1 + 4 * EPS)).all()


def test_the_first_of_two_numbers_in_a_byte_is_the_low_one() -> None:
    (found,) = quantise([torch.tensor([[[-7.0, 7.0, 0.0, 1.0]]])], 4, "row")
    assert found.packed.tolist() == [[[1 | 15 << 4, 8 | 9 << 4]]]
    assert found.scale.tolist() == [[1.0]]


def test_zeros_stay_zeros() -> None:
    (found,) = quantise([torch.zeros(1, 2, 32)], 8, 16)
    assert not dequantise(found, 32).any()


def test_smaller_groups_are_nearer() -> None:
    matrix = with_outliers()[None]
    errors = []
    for block in ("row", 128, 64, 32, 16):
        (found,) = quantise([matrix], 4, block)
        errors.append((dequantise(found, 256) - matrix).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_groups_are_as_small_as_the_outliers_ask_for() -> None:
    alike = torch.where(drawn(8, 256) > 0, 1.0, -1.0)
    assert adaptive_group(alike) == 256
    assert adaptive_group(drawn(64, 256)) == 256
    assert adaptive_group(with_outliers()) == SMALLEST


def test_one_matrix_with_outliers_decides_for_its_layer() -> None:
    plain, outliers, other = drawn(64, 256), with_outliers(), drawn(2, 64, 256)
    assert [s.block for s in quantise([plain[None], other], 8, "adaptive")] == [None, None]
    stacks = quantise([torch.stack([plain[:8], outliers]), other], 8, "adaptive")
    assert [s.block for s in stacks] == [SMALLEST, SMALLEST]
    assert [s.scale.shape for s in stacks] == [(2, 8, 16), (2, 64, 16)]
    assert [s.block for s in quantise([outliers[None], drawn(1, 4, 12)], 8, 16)] == [None, None]


def test_a_block_is_not_longer_than_the_shortest_row() -> None:
    up, down = quantise([drawn(1, 4, 128), drawn(1, 4, 40)], 8, 64)
    assert (up.block, down.block) == (32, 32)
    assert down.scale.shape == (1, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1.0, 1e-4])  # the scales of the second are subnormal in float16
def test_scales_of_a_narrow_type_cut_no_element(bits, dtype, size) -> None:
    stack = (drawn(1, 64, 256) * size).to(dtype)
    (found,) = quantise([stack], bits, 32)
    assert found.scale.dtype == dtype
    error = (dequantise(found, 256) - stack.float()).abs()
    assert (error <= steps_of(found, 256) * (0.5 + 2**bits * EPS)).all()
    nearest = (stack.float().reshape(1, 64, 8, 32).abs().amax(-1) / (2 ** (bits - 1) - 1)).to(dtype)
    assert (nearest.float() < found.scale.float()).any()  # which would have cut some


def test_the_mean_square_error_falls_with_each_halving() -> None:
    matrix = with_outliers(512)[None]
    errors = []
    for group in (512, 256, 128, 64, 32, 16):
        (found,) = quantise([matrix], 4, group)
        errors.append((dequantise(found, 512) - matrix).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_alpha_says_how_much_a_halving_has_to_shrink() -> None:
    matrix = drawn(64, 256)
    sizes = [adaptive_group(matrix, alpha=alpha, smallest=32) for alpha in (0, 0.9, 1)]
    assert sizes == [256, 256, 32]
    ranges = [matrix.reshape(64, -1, n).abs().amax(-1).mean().item() for n in (256, 128)]
    for alpha, size in ((ranges[1] / ranges[0] - 0.001, 256), (ranges[1] / ranges[0] + 0.001, 128)):
        assert adaptive_group(matrix, alpha=alpha, smallest=128) == size
    assert adaptive_group(with_outliers(), alpha=0) == 256
    assert adaptive_group(with_outliers(), smallest=64) == 64
    assert adaptive_group(torch.zeros(4, 64), alpha=1) == 64


def test_groups_divide_the_rows() -> None:
    wide = drawn(8, 576)
    wide[:, ::64] *= 30
    assert adaptive_group(wide, smallest=64) == 64  # of 576 = 9 * 64
    assert adaptive_group(drawn(8, 100), alpha=1) == 100
    assert common_group([wide, drawn(8, 1536)], smallest=64) == 64
    assert common_group([drawn(8, 576), drawn(8, 1536)]) is None
    assert common_group([wide, drawn(8, 48)]) == 16


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([8, 4]), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99)
)  # fmt: skip
def test_words_are_those_of_compressed_tensors(bits, rows, columns, seed) -> None:
    """And what it makes of them are the numbers that were rounded."""
    weight = drawn(1, rows, columns, seed=seed)
    (found,) = quantise([weight], bits, "row")
    packed = words(found.packed[0])
    q = unpack_from_int32(packed, bits, torch.Size((rows, columns)))
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(q.float() * steps_of(found, columns)[0], dequantise(found, columns)[0])
    limit = 2 ** (bits - 1) - 1
    assert q.abs().max() <= limit
    assert q.abs().amax(-1).eq(limit).all()
