"""What figures show: intervals over seeds and pairs, the expected best of N clips, the committed measurements."""

import itertools
import json
import random
from statistics import fmean

import numpy as np
import pytest

from draw_best_of_n import compute_expected_best
from draw_speed import STAGE1, STAGE2, compose_steps, draw_growth, draw_speed, read
from draw_thoughts import measure_coverage, sweep_thinking
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


def test_difference_is_paired_and_the_verdict_follows_its_interval():
    """Two models that fail on the same pairs but for a few are told apart where two intervals would overlap."""
    reference = make_correct(2, 300, 0.7)
    better = reference.copy()
    better[:, :12] = True
    difference = estimate_difference(better, reference)
    assert difference.value == pytest.approx(better.mean() - reference.mean())
    assert difference.low > 0
    assert estimate_accuracy(reference).high > estimate_accuracy(better).low
    assert estimate_difference(better, better) == Interval(0.0, 0.0, 0.0, 2, 300)
    verdicts = [judge(difference), judge(estimate_difference(reference, better)), judge(Interval(0.0, 0.0, 0.1, 1, 9))]
    assert verdicts == ["holds", "the reverse holds", "undecided"]
    with pytest.raises(ValueError, match=r"\(2, 300\) and \(2, 6\) seeds and pairs cannot be paired"):
        estimate_difference(better, np.ones((2, 6)))


def test_expected_best_of_n_is_the_mean_over_all_draws():
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 7)
        rewards, values = rng.sample(range(100), count), [rng.random() for _ in range(count)]
        for n in range(1, count + 1):
            draws = itertools.combinations(range(count), n)
            expected = fmean(values[max(draw, key=rewards.__getitem__)] for draw in draws)
            assert compute_expected_best(rewards, values, n=n) == pytest.approx(expected)
    assert compute_expected_best([1, 1, 0], [4.0, 2.0, 0.0], n=3) == 3.0  # equal rewards share equally


def test_intervals_of_normal_thoughts_cover_and_the_curve_ends_where_all_think():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(200, 1024)) + rng.normal(size=(200, 1))
    for k in (2, 8):
        assert measure_coverage(rewards, k)[0] == pytest.approx(0.95, abs=0.01)
    masked, thought, labels = np.array([1.0, -0.1, 3.0]), np.array([2.0, 1.0, -1.0]), np.array([1, 1, -1])
    points = sweep_thinking(masked, thought, labels)
    assert (points[0], points[10], points[-1]) == ((0, 0.3333, 0.3333), (0.3333, 0.6667, 0.6667), (1, 1, 1))


def test_original_step_by_hand():
    """16 videos with prompts of 990 tokens and 8 responses of 10: 17,120 tokens packed, 128,000 with every prompt."""
    median = {"perf/packed_tokens": 17_120, "response_length/mean": 9.0}
    ours = {"generate": 5.0, "prepare": 2.0, "update": 6.0, "hand_over": 1.0}
    median |= {f"timing/seconds/{name}": seconds for name, seconds in {**ours, "step": 99.0}.items()}
    original = {"tokens": 32_000, "seconds": {"old": 2.0, "reference": 1.0, "update": 8.0, "loss": 0.5}}
    steps = compose_steps(median, original)
    assert steps == {"ours": ours, "original": {"generate": 5.0, "old": 8.0, "reference": 4.0, "update": 32.0}}


def test_every_bar_and_curve_has_the_numbers_of_the_committed_result():
    speedups, steps = ([text.get_text().strip() for text in ax.texts] for ax in draw_speed().axes)
    files = (STAGE1 / "step_h100.json", STAGE2 / "update_h100.json", STAGE2 / "score_h100.json")
    stage1, update, scoring = (f"{read(path)['speedup']:.1f}x" for path in files)
    assert speedups == [stage1, update, "7.4x", scoring]
    assert steps == ["33 s", "244 s"]
    rows = json.loads((STAGE2 / "growth_h100.json").read_text())["growth"]["pairs"]
    drawn = [list(panel.lines[0].get_ydata()) for panel in draw_growth().axes if panel.lines]
    assert [sum(row["seconds"].values()) for row in rows] in drawn
