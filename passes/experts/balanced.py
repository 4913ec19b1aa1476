"""Balanced k-means: groups of exactly the sizes that were asked for, without an F x F matrix.

Lloyd's iteration, but points go to the nearest centroid *subject to the group sizes*. With K fixed
centroids that is a transportation problem, and it is solved exactly:

1. Prices. A price p_k on each group turns the problem into "each point takes its cheapest group of
   cost + price", and some prices give every group its size up to ties (linear programming
   duality). They are found one group at a time, each price being set such that its group would
   get its size, and are kept from one Lloyd step to the next, where they are nearly right.
2. Augmenting paths. Whatever surplus is left moves from crowded to short groups along shortest
   paths in a graph of K nodes, where the edge a -> b is the cheapest move of one point of a to b.
   Points on their cheapest group are optimal for the sizes that they happen to give, and shortest
   paths keep that, so the end is optimal for the sizes asked for.

Both are the ideas of auction and Hungarian algorithms for assignment; what makes them fast here is
that there are few groups: all work is on K x F costs and K x K moves.

Shape suffixes: F points (neurons), D features, K groups.

Source:
    Lloyd, "Least squares quantization in PCM", 1982, https://doi.org/10.1109/TIT.1982.1056489
    Arthur and Vassilvitskii, "k-means++", 2007, https://dl.acm.org/doi/10.5555/1283383.1283494
    Bertsekas, "The auction algorithm", 1988, https://doi.org/10.1007/BF02186476
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from upcycle.errors import UnsupportedError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_STEPS = 30  # at most
# A step that gains less than this part of what the groups explain counts as none.
_TOLERANCE = 1e-4

# A mean contains the point itself, which holds the point in its group: with many features, plain
# Lloyd stops at its first step. So that part is taken out of the cost of staying (Hartigan's rule).
# All points moving at once can then overshoot; after each step that gains nothing, half is taken.
_LEAST_REMOVED = 1 / 8


def balanced_clusters(
    features_FD: torch.Tensor,
    sizes: Sequence[int],
    *,
    generator: torch.Generator,
) -> torch.Tensor:
    """Cluster rows into groups of given sizes with a small sum of squared distances to the means.

    The same generator state gives the same labels; the best of all steps is kept.

    Args:
        features_FD: [F, D], any float dtype; computed in float32.
        sizes: K group sizes, which sum to F.
        generator: CPU generator of the k-means++ draws.

    Returns:
        Group of each row, [F] int64. Memory: one float32 copy of the features if they are in
        another dtype, and a few float64 arrays of K * F.

    Raises:
        ValueError: the sizes do not sum to F, or one is negative.
        UnsupportedError: a feature is NaN or infinite.
    """
    sizes_K = np.asarray(sizes, dtype=np.int64)
    if sizes_K.sum() != len(features_FD) or (sizes_K < 0).any():
        raise ValueError(f"sizes sum to {sizes_K.sum()}, but there are {len(features_FD)} rows")
    features_FD = features_FD.detach().float()
    # Not features_FD.square(): that would be a second copy of the features.
    square_F = torch.linalg.vector_norm(features_FD, dim=1).square()
    if not square_F.isfinite().all():
        raise UnsupportedError("rows with NaN or infinity cannot be clustered; check the weights")
    if len(sizes_K) == 1:
        return torch.zeros(len(features_FD), dtype=torch.int64)
    return torch.from_numpy(_lloyd(features_FD, square_F, sizes_K, generator))


def _lloyd(
    features_FD: torch.Tensor, square_F: torch.Tensor, sizes_K: Ints, generator: torch.Generator
) -> Ints:
    """The best labels on the way from a k-means++ start."""
    every = np.arange(len(features_FD))
    centroids_KD = _plus_plus(features_FD, square_F, len(sizes_K), generator)
    prices_K = np.zeros(len(sizes_K))
    labels_F, cost = np.zeros(len(features_FD), dtype=np.int64), np.inf
    removed = 1.0
    for _ in range(_STEPS):
        # |x - c|^2 without |x|^2, which is the same whatever group x is in.
        cost_KF = (centroids_KD @ features_FD.t()).mul_(-2).double()
        cost_KF += centroids_KD.double().square().sum(1, keepdim=True)
        if cost < np.inf:
            own_F = removed * 2 * square_F.double().numpy() / sizes_K[labels_F]
            cost_KF.numpy()[labels_F, every] += own_F
        new_labels_F, prices_K = assign(cost_KF.numpy(), sizes_K, prices_K)
        new_centroids_KD = _means(features_FD, new_labels_F, sizes_K)
        # With the means as centroids the objective is sum |x|^2 - sum_k n_k |c_k|^2.
        new_cost = -float(sizes_K @ new_centroids_KD.double().square().sum(1).numpy())
        gain = cost - new_cost
        if gain > 0:
            labels_F, centroids_KD, cost = new_labels_F, new_centroids_KD, new_cost
        if gain <= _TOLERANCE * abs(cost):
            removed /= 2
            if removed < _LEAST_REMOVED:
                break
    return labels_F


def _plus_plus(
    features_FD: torch.Tensor, square_F: torch.Tensor, groups: int, generator: torch.Generator
) -> torch.Tensor:
    """k-means++: each centroid is a row drawn with odds of its squared distance to the others."""
    nearest_F = torch.ones_like(square_F)
    rows: list[int] = []
    for _ in range(groups):
        if not nearest_F.any():  # fewer distinct rows than groups
            nearest_F = torch.ones_like(square_F)
        row = int(torch.multinomial(nearest_F, 1, generator=generator))
        distance_F = square_F + square_F[row] - 2 * (features_FD @ features_FD[row])
        distance_F.clamp_(min=0)[row] = 0
        nearest_F = torch.minimum(nearest_F, distance_F) if rows else distance_F
        rows.append(row)
    return features_FD[rows]


def _means(features_FD: torch.Tensor, labels_F: Ints, sizes_K: Ints) -> torch.Tensor:
    """Mean row of each group as one matrix product; zeros for a group of size zero."""
    member_KF = torch.zeros(len(sizes_K), len(labels_F))
    member_KF[torch.from_numpy(labels_F), torch.arange(len(labels_F))] = 1
    return (member_KF @ features_FD) / torch.from_numpy(sizes_K).clamp(min=1)[:, None]


def assign(cost_KF: Floats, sizes_K: Ints, prices_K: Floats) -> tuple[Ints, Floats]:
    """The cheapest assignment of F points to K groups of exact sizes.

    Args:
        cost_KF: [K, F] cost of each point in each group; overwritten.
        sizes_K: [K] points of each group, summing to F.
        prices_K: [K] first guess of the prices; zeros, or the result of a similar problem.

    Returns:
        Labels [F], optimal up to rounding, and prices [K] for the next call.
    """
    prices_K = prices_K - prices_K.min()
    cost_KF += prices_K[:, None]
    labels_F, change_K = _price(cost_KF, sizes_K)
    _augment(cost_KF, labels_F, sizes_K)
    return labels_F, prices_K + change_K


def _price(cost_KF: Floats, sizes_K: Ints) -> tuple[Ints, Floats]:
    """Change prices, in place on the costs, until the cheapest groups have nearly the right sizes.

    Returns a cheapest group of each point [F], and the change of the prices [K].
    """
    groups, points = cost_KF.shape
    change_K = np.zeros(groups)
    labels_F = cost_KF.argmin(0)
    # The group that is most wrong gets its size. Where many points have several cheapest groups,
    # this hands them round; then short groups alone do, each of which takes what it lacks.
    short_ones, best, since = False, np.inf, 0
    while since < 2 * groups:
        excess_K = np.bincount(labels_F, minlength=groups) - sizes_K
        wrong = int(np.abs(excess_K).sum())
        # The last few are left to the augmenting paths: a step reads all K * F costs, a path few.
        # So is what no price can settle.
        if wrong <= 2 * max(groups, points // 64):
            break
        best, since = (wrong, 0) if wrong < best else (best, since + 1)
        if since == groups and not short_ones:
            short_ones, best, since = True, np.inf, 0
        group = int((-excess_K if short_ones else np.abs(excess_K)).argmax())
        size = sizes_K[group]
        own_F = cost_KF[group].copy()
        cost_KF[group] = np.inf
        margin_F = cost_KF.min(0) - own_F
        # With price p the group gets the points of margin > p, and may have those of margin p: p
        # lies between the margins of the first point that is out and the last that is in.
        edges = [rank for rank in (points - size - 1, points - size) if 0 <= rank < points]
        order_F = np.argpartition(margin_F, edges)
        price = float(margin_F[order_F[edges]].mean())
        inside_F = np.zeros(points, dtype=bool)
        inside_F[order_F[points - size :]] = True
        left = np.flatnonzero((labels_F == group) & ~inside_F)
        labels_F[left] = cost_KF[:, left].argmin(0)
        labels_F[inside_F] = group
        cost_KF[group] = own_F + price
        change_K[group] += price
    return labels_F, change_K


def _augment(cost_KF: Floats, labels_F: Ints, sizes_K: Ints) -> None:
    """Move surplus points along cheapest paths of groups until every size is right, in place."""
    groups = len(sizes_K)
    move_KK = np.full((groups, groups), np.inf)

    def refresh(group: int) -> None:
        member = np.flatnonzero(labels_F == group)
        delta = cost_KF[:, member] - cost_KF[group, member]
        move_KK[group] = delta.min(1, initial=np.inf)

    def cheapest(a: int, b: int) -> Ints:
        """The points of `a` that may be the one which moves to `b`."""
        member = np.flatnonzero(labels_F == a)
        can: Ints = member[cost_KF[b, member] - cost_KF[a, member] <= move_KK[a, b] + slack]
        return can

    for group in range(groups):
        refresh(group)
    excess_K = np.bincount(labels_F, minlength=groups) - sizes_K
    # Rounding can make a cycle of length zero look negative; a path must not follow it.
    slack = 1e-12 * float(np.abs(cost_KF).max())
    while (excess_K > 0).any():
        path = _shortest_path(move_KK, excess_K, slack)
        moves = [(cheapest(a, b), b) for a, b in pairwise(path)]
        # Where costs are counts, many points can go the same way at the same price.
        count = min(excess_K[path[0]], -excess_K[path[-1]], *(len(some) for some, _ in moves))
        for some, b in moves:
            labels_F[some[:count]] = b
        for group in path:
            refresh(group)
        excess_K[path[0]] -= count
        excess_K[path[-1]] += count


def _shortest_path(move_KK: Floats, excess_K: Ints, slack: float) -> list[int]:
    """Cheapest path from any crowded group to any short one (Bellman-Ford: moves may be gains).

    In NumPy: for 64 groups networkx takes 49 times as long.
    """
    groups = len(excess_K)
    distance_K = np.where(excess_K > 0, 0.0, np.inf)
    before_K = np.full(groups, -1)
    for _ in range(groups - 1):
        through_KK = distance_K[:, None] + move_KK
        through_K = through_KK.min(0)
        better_K = through_K < distance_K - slack
        if not better_K.any():
            break
        before_K[better_K] = through_KK.argmin(0)[better_K]
        distance_K[better_K] = through_K[better_K]
    path = [int(np.where(excess_K < 0, distance_K, np.inf).argmin())]
    while before_K[path[-1]] >= 0 and len(path) <= groups:
        path.append(int(before_K[path[-1]]))
    return path[::-1]
