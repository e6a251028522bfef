"""Benchmark accuracies against values worked out by hand and against plain loops over every threshold."""

import math
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest

from scoring.accuracy import ModelRow, compute_model_table, compute_pair_accuracy


def is_right(margin: float, label: int, *, threshold: float | None) -> bool:
    """The definition, one pair at a time."""
    if threshold is not None and abs(margin) <= threshold:
        return label == 0
    return (margin > 0 and label == 1) or (margin < 0 and label == -1)


def count_right(margins: list[float], labels: list[int], *, threshold: float | None) -> int:
    return sum(is_right(margin, label, threshold=threshold) for margin, label in zip(margins, labels, strict=True))


def search_threshold(margins: list[float], labels: list[int]) -> tuple[float | None, float]:
    """Every candidate, from no tie to ties only; a later one has to be strictly better."""
    candidates = [None, *sorted({abs(margin) for margin in margins})]
    counts = [count_right(margins, labels, threshold=threshold) for threshold in candidates]
    return candidates[counts.index(max(counts))], max(counts) / len(labels)


def search_sweep(margins: list[float], labels: list[int]) -> float:
    """The best of n steps, each judged from scratch; the start is not among them."""
    in_order = sorted(zip(margins, labels, strict=True), key=lambda pair: abs(pair[0]))
    right_if_tie = [label == 0 for _, label in in_order]
    right_if_not = [is_right(*pair, threshold=None) for pair in in_order]
    return max(sum(right_if_tie[:n] + right_if_not[n:]) for n in range(1, len(labels) + 1)) / len(labels)


def make_small_cases(num_cases: int) -> Iterator[tuple[list[float], list[int]]]:
    """Up to 8 pairs each, margins in -2..2, so that zeros and equal magnitudes are common."""
    rng = np.random.default_rng(7)
    for size in rng.integers(1, 9, size=num_cases):
        yield rng.integers(-2, 3, size=size).astype(float).tolist(), rng.integers(-1, 2, size=size).tolist()


@pytest.mark.parametrize(
    ("margins", "labels", "expected"),
    [  # without ties, with ties, threshold, sweep
        # Decided: 3 right, -2 wrong. Right with no tie 1, at 0.25 2, at 0.5 3, at 2 still 3, at 3 only the ties: 2.
        ((3, -2, 0.5, 0.25), (1, 1, 0, 0), (0.5, 0.75, 0.5, 0.75)),
        # Equal rewards prefer neither: the zeros are wrong for A as for B, and right for the tie once 0 is called one.
        ((1.0, -1.0, 0.0, -0.0, 0.0), (1, -1, 1, -1, 0), (0.5, 0.6, 0.0, 0.6)),
        # The sweep stops between equal margins, which no threshold can tell apart ...
        ((3, -2, 0.5, 0.5), (1, 1, 0, 1), (2 / 3, 0.5, None, 0.75)),
        # ... and depends on file order there.
        ((3, -2, 0.5, 0.5), (1, 1, 1, 0), (2 / 3, 0.5, None, 0.5)),
    ],
)
def test_accuracies_by_hand(margins, labels, expected):
    accuracy = compute_pair_accuracy(margins, labels, num_resamples=1)
    found = (accuracy.without_ties.value, accuracy.with_ties.value, accuracy.threshold, accuracy.sweep)
    assert found == pytest.approx(expected)
    assert (accuracy.num_pairs, accuracy.num_ties) == (len(labels), labels.count(0))


def test_accuracies_match_a_count_and_a_search_over_every_threshold():
    for margins, labels in make_small_cases(1500):
        accuracy = compute_pair_accuracy(margins, labels, num_resamples=1)
        assert (accuracy.threshold, accuracy.with_ties.value) == search_threshold(margins, labels), (margins, labels)
        assert accuracy.sweep == search_sweep(margins, labels), (margins, labels)
        num_decided = len(labels) - labels.count(0)
        if num_decided:  # a tie is never right when none is called
            num_correct = count_right(margins, labels, threshold=None)
            assert accuracy.without_ties.value == num_correct / num_decided


def test_intervals_are_as_wide_as_theory_says_and_repeat_by_seed():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, size=6000)
    margins = labels + rng.normal(size=6000)  # they tell something of decided pairs and of ties
    accuracy = compute_pair_accuracy(margins, labels)
    for estimate, n in ((accuracy.without_ties, accuracy.num_decided), (accuracy.with_ties, accuracy.num_pairs)):
        # With ties this holds for a fixed threshold; calibrating it changes little on this many pairs.
        width = 2 * 1.96 * math.sqrt(estimate.value * (1 - estimate.value) / n)
        assert estimate.low < estimate.value < estimate.high
        assert estimate.high - estimate.low == pytest.approx(width, rel=0.15)
    first, again, other = (compute_pair_accuracy(margins[:100], labels[:100], seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.with_ties != other.with_ties


def test_without_pairs_or_decided_pairs_there_is_no_accuracy():
    assert set(asdict(compute_pair_accuracy([], [])).values()) == {0, None}
    only_ties = compute_pair_accuracy((1.0, -1.0), (0, 0))
    assert (only_ties.num_decided, only_ties.without_ties) == (0, None)
    assert (only_ties.with_ties.value, only_ties.threshold, only_ties.sweep) == (1.0, 1.0, 1.0)
    assert compute_model_table([], [], []) == []
    with pytest.raises(AssertionError, match="not finite"):
        compute_pair_accuracy((1.0, float("nan")), (1, 1))


def test_model_table_matches_a_count_by_hand_and_ends_with_models_without_a_decided_pair():
    models = [("kling", "sora"), ("sora", "kling"), ("sora", "gen3"), ("gen3", "kling"), ("sora", "cog")]
    margins, labels = (-1.0, 2.0, 0.0, 3.0, 5.0), (-1, -1, 1, -1, 0)
    # People: sora, kling, sora, kling. Rewards: sora (right), sora (wrong), neither (wrong), gen3 (wrong). The last
    # pair is a tie, cog's only one. kling and sora both win 2 of 3 for people: the name decides.
    assert compute_model_table(margins, labels, models) == [
        ModelRow("kling", num_decided=3, accuracy=1 / 3, human_win_rate=2 / 3, reward_win_rate=0.0),
        ModelRow("sora", num_decided=3, accuracy=1 / 3, human_win_rate=2 / 3, reward_win_rate=2 / 3),
        ModelRow("gen3", num_decided=2, accuracy=0.0, human_win_rate=0.0, reward_win_rate=0.5),
        ModelRow("cog", num_decided=0, accuracy=None, human_win_rate=None, reward_win_rate=None),
    ]
