"""Intervals over seeds and pairs, and the verdicts on claims."""

import numpy as np
import pytest

from evidence.intervals import Interval, estimate_accuracy, estimate_difference, judge


def make_correct(num_seeds: int, num_pairs: int, share: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_seeds, num_pairs)) < share


def test_seeds_that_agree_add_no_certainty_and_seeds_that_differ_widen_the_interval():
    row = make_correct(1, 300, 0.7)
    alone = estimate_accuracy(row)
    share = row.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 300)  # of a proportion
    assert (alone.value, alone.num_seeds, alone.num_pairs) == (share, 1, 300)
    assert (alone.low, alone.high) == pytest.approx((share - half, share + half), abs=0.008)
    same = estimate_accuracy(np.repeat(row, 3, axis=0))
    assert (same.high - same.low) == pytest.approx(alone.high - alone.low, rel=0.1)
    wide = estimate_accuracy(np.concatenate([make_correct(1, 300, share) for share in (0.5, 0.7, 0.9)]))
    assert wide.high - wide.low > 2 * (alone.high - alone.low)


def test_difference_is_paired():
    """Two models that fail on the same pairs but for a few are told apart where two intervals would overlap."""
    reference = make_correct(2, 300, 0.7)
    better = reference.copy()
    better[:, :12] = True
    difference = estimate_difference(better, reference)
    assert difference.value == pytest.approx(better.mean() - reference.mean())
    assert difference.low > 0
    assert estimate_accuracy(reference).high > estimate_accuracy(better).low
    assert estimate_difference(better, better) == Interval(0.0, 0.0, 0.0, 2, 300)
    with pytest.raises(ValueError, match=r"\(2, 300\) and \(2, 6\) seeds and pairs cannot be paired"):
        estimate_difference(better, np.ones((2, 6)))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.1, "holds"), (-0.1, -0.01, "the reverse holds"), (-0.01, 0.1, "undecided"), (0.0, 0.1, "undecided")],
)
def test_verdict_follows_the_interval(low, high, verdict):
    assert judge(Interval((low + high) / 2, low, high, 1, 10)) == verdict
