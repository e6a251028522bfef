"""Statistics of the evidence: accuracies and their differences with 95% intervals over seeds and pairs. Pure: numpy.

`correct` is bool [seeds, pairs]: whether the model that was trained with a seed orders a held-out pair as its label
does. All models judge the same pairs, in the same order. Intervals come from a bootstrap that draws pairs with
replacement, the same for all seeds, and, where there is more than one seed, seeds as well (both ways of an array are
resampled independently: Owen 2007, "The pigeonhole bootstrap", which is on the cautious side where there are many of
each; three seeds are few). With a single seed the interval does not say how much another seed would change.
"""

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A `value` with the `low` and `high` ends of its 95% interval (percentiles), from `num_seeds` and `num_pairs`."""

    value: float
    low: float
    high: float
    num_seeds: int
    num_pairs: int


def estimate_accuracy(correct: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean over seeds and pairs of `correct`, bool [seeds, pairs]; weights of resampled seeds and pairs multiply."""
    values = np.asarray(correct, dtype=float)
    num_seeds, num_pairs = values.shape
    rng = np.random.default_rng(seed)
    pairs = rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=NUM_RESAMPLES)
    seeds = np.ones((NUM_RESAMPLES, 1))
    if num_seeds > 1:
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES)
    means = (pairs @ values.T * seeds).sum(axis=1) / values.size
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(values.mean()), float(low), float(high), num_seeds, num_pairs)


def estimate_difference(correct: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Interval:
    """Accuracy of `correct` minus that of `reference`, both bool [seeds, pairs], paired by seed and pair.

    Raises ValueError when they are not of the same seeds and pairs.
    """
    if correct.shape != reference.shape:
        raise ValueError(f"results over {correct.shape} and {reference.shape} seeds and pairs cannot be paired")
    return estimate_accuracy(correct.astype(float) - reference, seed=seed)


def judge(difference: Interval) -> str:
    """Whether "the first is better" holds by its interval: "holds", "the reverse holds" or "undecided"."""
    if difference.low > 0:
        return "holds"
    return "the reverse holds" if difference.high < 0 else "undecided"


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Trailing mean over up to `width` values, of the same length; NaNs are left out where there is anything else."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    return np.ma.masked_invalid(windows).mean(axis=1).filled(np.nan)
