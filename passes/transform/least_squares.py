"""Weighted ridge regression from sums, in correlation form.

Shape suffixes: T tokens, P predictors, O outputs, R rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass
class Sums:
    """``Z'WZ``, ``Z'WY`` and ``tr Y'WY`` of the tokens added so far; float32."""

    zz_PP: torch.Tensor
    zy_PO: torch.Tensor
    yy: float = 0.0

    @staticmethod
    def zeros(predictors: int, outputs: int) -> "Sums":
        """Sums over no token."""
        return Sums(torch.zeros(predictors, predictors), torch.zeros(predictors, outputs))

    def add(self, z_TP: torch.Tensor, y_TO: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Add tokens with their weights."""
        weighted_PT = z_TP.t() * weight_T
        self.zz_PP.addmm_(weighted_PT, z_TP)
        self.zy_PO.addmm_(weighted_PT, y_TO)
        self.yy += squares(y_TO, weight_T)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.zz_PP + other.zz_PP, self.zy_PO + other.zy_PO, self.yy + other.yy)

    def through(self, basis_PQ: torch.Tensor) -> "Sums":
        """The sums of the predictors ``z @ basis``."""
        return Sums(basis_PQ.t() @ self.zz_PP @ basis_PQ, basis_PQ.t() @ self.zy_PO, self.yy)

    def error(self, beta_PO: torch.Tensor) -> float:
        """The weighted square error of a solution on these tokens."""
        fitted = (beta_PO * (self.zz_PP @ beta_PO)).sum() - 2 * (beta_PO * self.zy_PO).sum()
        return float(fitted) + self.yy


def squares(y_TO: torch.Tensor, weight_T: torch.Tensor) -> float:
    """The weighted sum of squares, ``tr Y'WY``."""
    return float((weight_T * y_TO.square().sum(1)).sum())


def solve(sums: Sums, penalty_P: torch.Tensor) -> torch.Tensor:
    """argmin over B of ``sum w |y - B'z|^2 + sum_p penalty_p s_p |B_p|^2``, [P, O].

    s_p is the weighted sum of squares of predictor p, so a penalty of 1 halves what a predictor
    that is alone would get, whatever its unit. A predictor that is always zero gets zeros.
    """
    diagonal_P = sums.zz_PP.diagonal()
    scale_P = (diagonal_P.clamp(min=0) + 1e-7 * diagonal_P.mean() + 1e-30).rsqrt()
    matrix_PP = sums.zz_PP * scale_P * scale_P[:, None]
    # What is left of the diagonal after rounding sums of float32 must stay positive.
    matrix_PP.diagonal().add_(penalty_P + 1e-5)
    factor_PP = torch.linalg.cholesky(matrix_PP)
    beta_PO: torch.Tensor = torch.cholesky_solve(sums.zy_PO * scale_P[:, None], factor_PP)
    return beta_PO * scale_P[:, None]


def best_penalty(
    fit: Sums, held_out: Sums, penalties: Iterable[float], relative_P: torch.Tensor
) -> float:
    """The penalty, times `relative_P`, whose solution on `fit` is best on `held_out`."""
    errors = {p: held_out.error(solve(fit, p * relative_P)) for p in penalties}
    return min(errors, key=lambda penalty: errors[penalty])


def input_basis(beta_PO: torch.Tensor, cov_PP: torch.Tensor, rank: int) -> torch.Tensor:
    """Directions [P, R] of the input that a linear map of this rank should read.

    The best approximation of ``z -> B'z`` by a map of rank R, in the mean over inputs with second
    moments `cov_PP`, reads the input through these columns.
    """
    values_P, vectors_PP = torch.linalg.eigh(cov_PP.double())
    values_P = values_P.clamp(min=float(values_P[-1]) * 1e-10)
    root_PP = (vectors_PP * values_P.sqrt()) @ vectors_PP.t()
    inverse_PP = (vectors_PP / values_P.sqrt()) @ vectors_PP.t()
    left_PR, size_R, _ = torch.linalg.svd(root_PP @ beta_PO.double(), full_matrices=False)
    basis_PR: torch.Tensor = inverse_PP @ (left_PR[:, :rank] * size_R[:rank])
    return basis_PR.float()
