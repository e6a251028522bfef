"""The expected value of the best of N clips, against all draws."""

import itertools
import random
from statistics import fmean

import pytest

from draw_best_of_n import compute_expected_best


def best_of_all_draws(rewards: list[float], values: list[float], n: int) -> float:
    """The mean value of the best clip of every draw; of several best ones, their mean."""
    means = []
    for draw in itertools.combinations(range(len(rewards)), n):
        top = max(rewards[i] for i in draw)
        means.append(fmean(values[i] for i in draw if rewards[i] == top))
    return fmean(means)


def test_expectation_is_the_mean_over_all_draws():
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 7)
        rewards, values = rng.sample(range(100), count), [rng.random() for _ in range(count)]
        for n in range(1, count + 1):
            expected = best_of_all_draws(rewards, values, n)
            assert compute_expected_best(rewards, values, n=n) == pytest.approx(expected)
    assert compute_expected_best([1, 1, 0], [4.0, 2.0, 0.0], n=3) == 3.0  # equal rewards share equally
