"""Distances against calculations by hand."""

import math

import pytest
import torch

from upcycle.verification.metrics import compare_predictions, distance


def test_a_distance_by_hand() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    actual = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    found = distance(actual, reference)
    assert found.max_abs == 1.0
    assert found.relative == 1.0 / 4.0
    assert found.rms == pytest.approx(1.0 / 29**0.5)
    assert found.min_cosine == pytest.approx(2 / 5**0.5)
    assert found.mean_cosine == pytest.approx((1 + 2 / 5**0.5) / 2)


def test_equal_tensors_are_at_distance_zero() -> None:
    tensor = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = distance(tensor.clone(), tensor)
    assert (found.max_abs, found.relative, found.rms) == (0, 0, 0)
    assert found.min_cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["actual", "reference", "both"])
def test_what_is_not_a_number_is_infinitely_far(bad: float, where: str) -> None:
    """Two NaN are no agreement; two equal infinities are (a masked logit)."""
    actual, reference = torch.ones(2, 3), torch.ones(2, 3)
    if where != "reference":
        actual[0, 1] = bad
    if where != "actual":
        reference[0, 1] = bad
    found = distance(actual, reference)
    same = where == "both" and not math.isnan(bad)
    assert found.relative == (0 if same else math.inf)
    assert not math.isnan(found.rms)
    assert not math.isnan(found.min_cosine)


def test_zeros() -> None:
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert distance(zero, zero).relative == 0
    assert distance(zero, zero).min_cosine == 1
    assert distance(one, zero).relative == math.inf


def test_a_single_number_has_a_distance() -> None:
    assert distance(torch.tensor(1.5), torch.tensor(1.0)).relative == 0.5


def test_small_types_are_compared_in_float64() -> None:
    reference = torch.tensor([256.0], dtype=torch.bfloat16)
    found = distance(torch.tensor([258.0], dtype=torch.bfloat16), reference)
    assert found.max_abs == 2.0


def test_predictions_by_brute_force() -> None:
    """One token after the other, with `math` alone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (2, 4), generator=generator)
    dense, converted = (torch.randn(2, 4, 5, generator=generator).double() for _ in range(2))
    in_two_batches = zip(dense.split(1), converted.split(1), tokens.split(1), strict=True)
    kl, nll, other_nll, agreed = 0.0, 0.0, 0.0, 0
    for row in range(2):
        for place in range(3):
            p, q = (
                [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
                for logits in (dense[row, place].tolist(), converted[row, place].tolist())
            )
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            following = int(tokens[row, place + 1])
            nll -= math.log(p[following])
            other_nll -= math.log(q[following])
            agreed += p.index(max(p)) == q.index(max(q))
    found = compare_predictions(in_two_batches)
    assert found.tokens == 6
    assert found.kl == pytest.approx(kl / 6, rel=1e-12)
    assert found.top1_agreement == agreed / 6
    assert found.dense_perplexity == pytest.approx(math.exp(nll / 6), rel=1e-12)
    assert found.converted_perplexity == pytest.approx(math.exp(other_nll / 6), rel=1e-12)


def test_equal_predictions() -> None:
    logits = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(0))
    found = compare_predictions([(logits, logits, torch.zeros(1, 6, dtype=torch.long))])
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.dense_perplexity == found.converted_perplexity


def test_without_tokens_nothing_is_divided_by_zero() -> None:
    assert compare_predictions([]).kl == 0
