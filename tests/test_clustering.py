"""Balanced k-means: exact sizes, exact assignment, and a result worth having."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from upcycle.errors import UnsupportedError
from upcycle.passes.experts.balanced import assign, balanced_clusters


def objective(features_FD: torch.Tensor, labels_F: torch.Tensor) -> float:
    """Sum of squared distances of the rows to the mean of their group, in float64."""
    total = 0.0
    for group in range(int(labels_F.max()) + 1):
        rows = features_FD[labels_F == group].double()
        total += float((rows - rows.mean(0)).square().sum()) if len(rows) else 0.0
    return total


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(points: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(points, features, generator=seeded(seed))


def best_cost(cost_KF: np.ndarray, sizes: list[int]) -> float:
    """The optimum, from scipy, with one column for each place in each group."""
    cost_FF = np.repeat(cost_KF, sizes, axis=0).T
    row, column = linear_sum_assignment(cost_FF)
    return float(cost_FF[row, column].sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[40] * 5, [100, 60, 30, 9, 1], [200, 0, 0, 0, 0]], ids=str)
def test_assignment_is_as_cheap_as_the_hungarian_one(sizes: list[int], seed: int) -> None:
    points, centres = random_rows(200, 8, seed), random_rows(5, 8, seed + 100)
    cost_KF = torch.cdist(centres, points).square().double().numpy()
    optimum = best_cost(cost_KF, sizes)
    labels_F, prices_K = assign(cost_KF.copy(), np.array(sizes), np.zeros(5))
    assert np.bincount(labels_F, minlength=5).tolist() == sizes
    assert cost_KF[labels_F, np.arange(200)].sum() <= optimum * (1 + 1e-9)
    # Prices from elsewhere, such as the last Lloyd step, change the way and not the result.
    for start_K in (prices_K, np.arange(5.0)):
        labels_F, _ = assign(cost_KF.copy(), np.array(sizes), start_K)
        assert cost_KF[labels_F, np.arange(200)].sum() <= optimum * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_assignment_of_counts_is_as_cheap_as_the_hungarian_one(levels: int, seed: int) -> None:
    """Many points have several cheapest groups, and most the same one."""
    drawn_KF = torch.randint(levels, (6, 300), generator=seeded(seed)).double()
    cost_KF = (drawn_KF + torch.arange(6.0)[:, None] % 3).numpy()
    sizes = [100, 80, 60, 40, 20, 0]
    labels_F, _ = assign(cost_KF.copy(), np.array(sizes), np.zeros(6))
    assert np.bincount(labels_F, minlength=6).tolist() == sizes
    assert cost_KF[labels_F, np.arange(300)].sum() <= best_cost(cost_KF, sizes) * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    features=st.integers(1, 5),
    seed=st.integers(0, 99),
    levels=st.sampled_from([1, 2, 100]),
)
def test_sizes_are_exact_whatever_the_rows(
    sizes: list[int], features: int, seed: int, levels: int
) -> None:
    # Few levels: many equal rows, and so many ties.
    rows = torch.randint(levels, (sum(sizes), features), generator=seeded(seed)).float()
    labels = balanced_clusters(rows, sizes, generator=seeded(seed))
    assert labels.dtype == torch.int64
    assert torch.bincount(labels, minlength=len(sizes)).tolist() == sizes


def test_separate_clusters_are_found() -> None:
    centres = 10 * torch.eye(4)
    truth = torch.arange(28) % 4
    rows = centres[truth] + random_rows(28, 4) / 10
    labels = balanced_clusters(rows, [7] * 4, generator=seeded(1))
    assert len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 4


def test_the_result_is_a_local_optimum_of_the_assignment() -> None:
    rows, sizes = random_rows(200, 8), [40] * 5
    labels = balanced_clusters(rows, sizes, generator=seeded(0))
    centres = torch.stack([rows[labels == group].mean(0) for group in range(5)])
    cost_KF = torch.cdist(centres, rows).square().double().numpy()
    assert objective(rows, labels) <= best_cost(cost_KF, sizes) * 1.01
    # Lloyd with the Hungarian method in each step, from the same number of starts, is no better.
    assert objective(rows, labels) <= 1.01 * lloyd_with_scipy(rows, sizes)


def lloyd_with_scipy(rows: torch.Tensor, sizes: list[int]) -> float:
    centres = rows[torch.randperm(len(rows), generator=seeded(0))[: len(sizes)]]
    labels = torch.zeros(len(rows), dtype=torch.int64)
    place = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(30):
        cost_FF = torch.cdist(rows, centres).square().double().numpy()[:, place]
        labels = torch.from_numpy(place[linear_sum_assignment(cost_FF)[1]])
        centres = torch.stack([rows[labels == group].mean(0) for group in range(len(sizes))])
    return objective(rows, labels)


def test_one_seed_gives_one_result() -> None:
    rows, sizes = random_rows(120, 6), [20] * 6
    one, again = (balanced_clusters(rows, sizes, generator=seeded(3)) for _ in range(2))
    other = balanced_clusters(rows, sizes, generator=seeded(4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_half_precision_rows_are_clustered_in_float32() -> None:
    rows = random_rows(64, 8).bfloat16()
    labels = balanced_clusters(rows, [16] * 4, generator=seeded(0))
    assert torch.equal(labels, balanced_clusters(rows.float(), [16] * 4, generator=seeded(0)))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="sizes sum to 5, but there are 6 rows"):
        balanced_clusters(random_rows(6, 2), [2, 3], generator=seeded(0))
    with pytest.raises(UnsupportedError, match="NaN"):
        balanced_clusters(torch.full((6, 2), torch.nan), [3, 3], generator=seeded(0))


def test_the_experts_of_a_small_model_take_well_under_a_second() -> None:
    # 0.25 s on two cores; the limit leaves room for a busy machine.
    start = time.perf_counter()
    balanced_clusters(random_rows(1536, 384), [24] * 64, generator=seeded(0))
    assert time.perf_counter() - start < 5
