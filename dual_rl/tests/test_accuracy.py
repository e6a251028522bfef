"""Benchmark accuracies against values worked out by hand and against plain loops over every threshold."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from scoring.accuracy import (
    ModelRow,
    calibrate_threshold,
    compute_model_table,
    compute_pair_accuracy,
    compute_sweep_accuracy,
)


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
    """The best of n steps, each of which is judged from scratch; the start is not among them."""
    in_order = sorted(zip(margins, labels, strict=True), key=lambda pair: abs(pair[0]))
    right_if_tie = [label == 0 for _, label in in_order]
    right_if_not = [is_right(*pair, threshold=None) for pair in in_order]
    return max(sum(right_if_tie[:n] + right_if_not[n:]) for n in range(1, len(labels) + 1)) / len(labels)


def make_small_cases(num_cases: int) -> Iterator[tuple[list[float], list[int]]]:
    """Up to 8 pairs each, margins in -2..2, so that zeros and equal magnitudes are common."""
    rng = np.random.default_rng(7)
    for size in rng.integers(1, 9, size=num_cases):
        yield rng.integers(-2, 3, size=size).astype(float).tolist(), rng.integers(-1, 2, size=size).tolist()


def make_benchmark(num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards that tell something of decided pairs and of ties."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, size=num_pairs)
    return labels + rng.normal(size=num_pairs), labels


def test_accuracy_matches_the_worked_example():
    # Decided: 3 is right, -2 is wrong. Right with no tie 1, at 0.25 2, at 0.5 3, at 2 still 3, at 3 only the ties: 2.
    accuracy = compute_pair_accuracy((3, -2, 0.5, 0.25), (1, 1, 0, 0))
    assert (accuracy.num_pairs, accuracy.num_decided, accuracy.num_ties) == (4, 2, 2)
    assert (accuracy.without_ties.value, accuracy.with_ties.value, accuracy.sweep) == (0.5, 0.75, 0.75)
    assert accuracy.threshold == 0.5


def test_equal_rewards_prefer_neither_video():
    # 1 and -1 are right; the zeros are wrong for A as for B; the tie counts only with ties, where 0 is called one.
    accuracy = compute_pair_accuracy((1.0, -1.0, 0.0, -0.0, 0.0), (1, -1, 1, -1, 0))
    assert accuracy.without_ties.value == 0.5
    assert (accuracy.with_ties.value, accuracy.threshold) == (3 / 5, 0.0)


def test_without_a_called_tie_a_margin_of_zero_is_wrong_even_for_a_tie():
    # No tie called: only 2 is right, 1 of 3. The threshold 0 takes both zeros: 3 of 3.
    assert calibrate_threshold((0.0, 0.0, 2.0), (0, 0, 1)) == (0.0, 1.0)
    # A zero that people decide is wrong both ways; fewer ties win.
    assert calibrate_threshold((0.0, 2.0), (1, 1)) == (None, 0.5)


def test_fewest_ties_win_among_equally_good_thresholds():
    # No tie 1 of 2 (the second); threshold 1 also calls the tie right, 2 of 2; threshold 2 loses the second again.
    assert calibrate_threshold((1.0, -2.0), (0, -1)) == (1.0, 1.0)
    # No tie 1 of 2, threshold 1: 0 of 2, threshold 2: 1 of 2. Both ends are as good; no tie is taken.
    assert calibrate_threshold((1.0, 2.0), (1, 0)) == (None, 0.5)


def test_sweep_parts_equal_margins_that_no_threshold_can_tell_apart():
    # Before the sweep 3 and the last are right, 2 of 4. It takes the tie at 0.5 and stops: 3 of 4. A threshold of 0.5
    # takes the last pair along: 2 of 4. In the other file order the sweep loses the decided pair first.
    assert compute_sweep_accuracy((3, -2, 0.5, 0.5), (1, 1, 0, 1)) == 0.75
    assert calibrate_threshold((3, -2, 0.5, 0.5), (1, 1, 0, 1)) == (None, 0.5)
    assert compute_sweep_accuracy((3, -2, 0.5, 0.5), (1, 1, 1, 0)) == 0.5


def test_sweep_begins_with_one_tie_as_published_tables_do():
    # All three are right as they are. The first step calls 1 a tie, which is wrong: 2 of 3.
    assert compute_sweep_accuracy((1.0, 2.0, 3.0), (1, 1, 1)) == 2 / 3
    assert calibrate_threshold((1.0, 2.0, 3.0), (1, 1, 1)) == (None, 1.0)
    # A pair that is wrong anyway costs nothing as a tie.
    assert compute_sweep_accuracy((-1.0, 2.0, 3.0), (1, 1, 1)) == 2 / 3
    # -1 is wrong, 0.5 and 2 right, 0 and 0.25 are ties: after 0 3 of 5, 0.25 4, 0.5 3, -1 3, 2 2.
    assert compute_sweep_accuracy((0.5, 0.0, 2.0, -1.0, 0.25), (1, 0, 1, 1, 0)) == 4 / 5


def test_accuracies_match_a_count_and_a_search_over_every_threshold():
    for margins, labels in make_small_cases(4000):
        accuracy = compute_pair_accuracy(margins, labels, num_resamples=1)
        assert (accuracy.threshold, accuracy.with_ties.value) == search_threshold(margins, labels), (margins, labels)
        assert calibrate_threshold(margins, labels) == search_threshold(margins, labels)
        assert accuracy.sweep == search_sweep(margins, labels), (margins, labels)
        num_decided = len(labels) - labels.count(0)
        num_correct = count_right(margins, labels, threshold=None)  # a tie is never right when none is called
        assert (accuracy.num_decided, accuracy.num_ties) == (num_decided, labels.count(0))
        if num_decided:
            assert accuracy.without_ties.value == num_correct / num_decided


def test_calibrated_accuracy_does_not_depend_on_file_order_or_on_which_video_is_a():
    for margins, labels in make_small_cases(500):
        swapped = [-margin for margin in margins[::-1]], [-label for label in labels[::-1]]
        assert calibrate_threshold(*swapped) == calibrate_threshold(margins, labels)


def test_interval_without_ties_matches_explicit_resampling():
    margins, labels = make_benchmark(300)
    outcomes = np.sign(margins[labels != 0]) == labels[labels != 0]
    drawn = np.random.default_rng(1).choice(outcomes, size=(4000, len(outcomes))).mean(axis=1)
    estimate = compute_pair_accuracy(margins, labels, num_resamples=4000).without_ties
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.01)


def test_intervals_contain_their_value_and_repeat_by_seed():
    margins, labels = make_benchmark(200)
    accuracy = compute_pair_accuracy(margins, labels, seed=1)
    for estimate in (accuracy.without_ties, accuracy.with_ties):
        assert 0.0 <= estimate.low < estimate.value < estimate.high <= 1.0
    assert compute_pair_accuracy(margins, labels, seed=1) == accuracy
    other = compute_pair_accuracy(margins, labels, seed=2)
    assert other.with_ties.value == accuracy.with_ties.value
    assert other.with_ties != accuracy.with_ties


def test_intervals_on_many_pairs_are_as_wide_as_theory_says():
    margins, labels = make_benchmark(6000)
    accuracy = compute_pair_accuracy(margins, labels)
    p, n, z = accuracy.without_ties.value, accuracy.num_decided, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)  # Wilson 1927
    assert (accuracy.without_ties.low, accuracy.without_ties.high) == pytest.approx(
        (centre - half, centre + half), abs=0.15 * half
    )
    # With ties the normal width holds for a fixed threshold; calibrating it changes little on this many pairs.
    p, n = accuracy.with_ties.value, accuracy.num_pairs
    width = accuracy.with_ties.high - accuracy.with_ties.low
    assert width == pytest.approx(2 * z * math.sqrt(p * (1 - p) / n), rel=0.15)


def test_a_benchmark_of_twenty_thousand_pairs_is_judged():
    margins, labels = make_benchmark(20_000)
    accuracy = compute_pair_accuracy(margins, labels)
    assert accuracy.with_ties.low < accuracy.with_ties.value < accuracy.with_ties.high
    assert accuracy.sweep == accuracy.with_ties.value


def test_without_pairs_or_decided_pairs_there_is_no_accuracy():
    assert set(asdict(compute_pair_accuracy([], [])).values()) == {0, None}
    only_ties = compute_pair_accuracy((1.0, -1.0), (0, 0))
    assert (only_ties.num_decided, only_ties.without_ties) == (0, None)
    assert (only_ties.with_ties.value, only_ties.threshold, only_ties.sweep) == (1.0, 1.0, 1.0)
    assert compute_model_table([], [], []) == []
    for compute in (calibrate_threshold, compute_sweep_accuracy):
        with pytest.raises(AssertionError, match="no pairs"):
            compute([], [])


def test_results_can_be_written_as_json():
    margins, labels = make_benchmark(30)
    rows = compute_model_table(margins, labels, [("x", "y"), ("y", "z"), ("z", "z")] * 10)
    written = [asdict(result) for result in (compute_pair_accuracy(margins, labels), *rows)]
    assert json.loads(json.dumps(written)) == written


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


def test_a_pair_of_a_model_with_itself_is_one_pair_and_half_a_win():
    # x against itself: people half a win, rewards half a win, wrong. x over y: a win for both, right.
    # z against itself with equal rewards: half a win for people, none for the rewards, wrong.
    models = [("x", "x"), ("x", "y"), ("z", "z")]
    assert compute_model_table((1.0, 1.0, 0.0), (-1, 1, 1), models) == [
        ModelRow("x", num_decided=2, accuracy=0.5, human_win_rate=0.75, reward_win_rate=0.75),
        ModelRow("z", num_decided=1, accuracy=0.0, human_win_rate=0.5, reward_win_rate=0.0),
        ModelRow("y", num_decided=1, accuracy=1.0, human_win_rate=0.0, reward_win_rate=0.0),
    ]


@pytest.mark.parametrize(
    ("margins", "labels", "message"),
    [
        ((1.0, float("nan")), (1, 1), "not finite"),
        ((1.0, 1.0), (1.0, 0.5), "labels are"),
        ((1.0, 1.0), (1,), "one margin and one label"),
    ],
)
def test_pairs_that_should_have_been_left_out_are_refused(margins, labels, message):
    table = partial(compute_model_table, models=[("x", "y")] * len(labels))
    for compute in (compute_pair_accuracy, calibrate_threshold, compute_sweep_accuracy, table):
        with pytest.raises(AssertionError, match=message):
            compute(margins, labels)
