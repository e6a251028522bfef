"""Intervals over seeds and pairs, and the verdicts on claims."""

import numpy as np
import pytest

from evidence.intervals import Interval, estimate_accuracy, estimate_difference, judge, smooth


def make_correct(num_seeds: int, num_pairs: int, share: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_seeds, num_pairs)) < share


def test_interval_of_one_seed_is_that_of_a_proportion():
    correct = make_correct(1, 400, 0.75)
    estimate = estimate_accuracy(correct)
    share = correct.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 400)
    assert estimate.value == share
    assert (estimate.low, estimate.high) == pytest.approx((share - half, share + half), abs=0.006)
    assert (estimate.num_seeds, estimate.num_pairs) == (1, 400)


def test_seeds_that_agree_add_no_certainty_and_seeds_that_differ_widen_the_interval():
    row = make_correct(1, 300, 0.7)
    same = estimate_accuracy(np.repeat(row, 3, axis=0))
    alone = estimate_accuracy(row)
    assert (same.high - same.low) == pytest.approx(alone.high - alone.low, rel=0.1)
    differing = np.concatenate([make_correct(1, 300, share) for share in (0.5, 0.7, 0.9)])
    wide = estimate_accuracy(differing)
    assert wide.high - wide.low > 2 * (alone.high - alone.low)


def test_difference_is_paired():
    """Two models that fail on the same pairs but for a few are told apart where two intervals would overlap."""
    reference = make_correct(2, 300, 0.7)
    better = reference.copy()
    better[:, :12] = True
    gain = better.mean() - reference.mean()
    difference = estimate_difference(better, reference)
    assert difference.value == pytest.approx(gain)
    assert difference.low > 0
    assert estimate_accuracy(reference).high > estimate_accuracy(better).low
    mirrored = estimate_difference(reference, better)
    assert (mirrored.low, mirrored.high) == pytest.approx((-difference.high, -difference.low), abs=0.003)


def test_a_model_does_not_differ_from_itself():
    correct = make_correct(3, 50, 0.6)
    assert estimate_difference(correct, correct) == Interval(0.0, 0.0, 0.0, 3, 50)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = [
        estimate.low <= 0.7 <= estimate.high
        for estimate in (estimate_accuracy(make_correct(1, 120, 0.7, seed), seed=seed) for seed in range(200))
    ]
    assert 0.90 <= np.mean(covered) <= 0.985


def test_results_of_other_pairs_or_seeds_are_not_paired():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\) seeds and pairs cannot be paired"):
        estimate_difference(np.ones((2, 5)), np.ones((2, 6)))
    with pytest.raises(ValueError, match="at least one of each"):
        estimate_accuracy(np.ones((0, 5)))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.1, "holds"), (-0.1, -0.01, "the reverse holds"), (-0.01, 0.1, "undecided"), (0.0, 0.1, "undecided")],
)
def test_verdict_follows_the_interval(low, high, verdict):
    assert judge(Interval((low + high) / 2, low, high, 1, 10)) == verdict


def test_smoothing_is_a_trailing_mean_without_what_is_missing():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    assert smooth(values, 2) == pytest.approx([1.0, 2.0, 3.0, 5.0, 6.0])
    assert np.isnan(smooth(np.array([np.nan, 1.0]), 3)[0])
