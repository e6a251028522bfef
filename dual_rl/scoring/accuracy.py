"""How well rewards agree with the preferences of people on a benchmark of video pairs. Pure: numpy alone.

Everywhere `margins` is float64 [n], the reward of A minus the reward of B, and `labels` is int [n]: +1 where people
prefer A, -1 where they prefer B, 0 for a tie. Pairs without a label or a score are left out by the caller.

Accuracy with ties needs a margin up to which the rewards, too, call a tie. It is calibrated on the very pairs that are
judged, as Deutsch, Foster and Freitag (2023, "Ties Matter") propose, so it leans upward. Published tables of video
reward models calibrate one pair at a time, where the paper moves equal margins together: `compute_sweep_accuracy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A share `value` in [0, 1] with the `low` and `high` ends of its 95% bootstrap interval (percentile method)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairAccuracy:
    """Agreement over `num_pairs` pairs, of which people decide `num_decided` and call `num_ties` a tie.

    `without_ties`: share of the decided pairs whose preferred video has the strictly higher reward; of two equal
    rewards neither is preferred, which is wrong. None when no pair is decided.
    `with_ties`: share of all pairs judged right when |margin| <= `threshold` is called a tie; `threshold` is the best
    one, None when it is best to call none. `sweep`: see `compute_sweep_accuracy`. Without pairs all four are None.

    Example: margins (3, -2, 0.5, 0.25) with labels (1, 1, 0, 0) are 1/2 without ties. Calling no tie is right once in
    four, a threshold of 0.25 twice, 0.5 three times, 2 three times, 3 twice: with ties 3/4 at 0.5.
    """

    num_pairs: int
    num_decided: int
    num_ties: int
    without_ties: Estimate | None
    with_ties: Estimate | None
    threshold: float | None
    sweep: float | None


@dataclass(frozen=True)
class ModelRow:
    """One generator model over the `num_decided` pairs that it takes part in and that people decide.

    `accuracy`: share of these on which the rewards agree with people. `human_win_rate`: share that people give to the
    model. `reward_win_rate`: share in which the model's video has the strictly higher reward. The three are None for
    a model without a decided pair.

    A pair of a model with itself is one pair of `num_decided` and `accuracy`. Win rates are means over the model's
    sides in a pair, one of which wins: such a pair is half a win (none by rewards that are equal).
    """

    model: str
    num_decided: int
    accuracy: float | None
    human_win_rate: float | None
    reward_win_rate: float | None


@dataclass(frozen=True)
class _SortedPairs:
    """Pairs in order of |margin|, file order among equals.

    `magnitudes` float64 [n]: |margin|. `is_correct` int64 [n]: 1 where the sign of the margin is right, which it never
    is for a margin of 0 or a tie. `gains` int64 [n]: what calling the pair a tie adds to the number of right ones.
    `group_ends` int64 [g]: the last place of each group of equal magnitudes; there lie the real thresholds.

    Example: margins (3, 0.5, -0.5), labels (1, 0, -1) give magnitudes (0.5, 0.5, 3), is_correct (0, 1, 1), gains
    (1, -1, -1), group_ends (1, 2).
    """

    magnitudes: np.ndarray
    is_correct: np.ndarray
    gains: np.ndarray
    group_ends: np.ndarray


def compute_pair_accuracy(
    margins: Sequence[float], labels: Sequence[int], *, num_resamples: int = 1000, seed: int = 0
) -> PairAccuracy:
    """All of `PairAccuracy`. Intervals come from `num_resamples` draws of as many pairs with replacement.

    The threshold is calibrated anew in every resample, so resampled accuracies lean upward more than `value` does: it
    tends to lie below the middle of its interval, in contrived cases below `low` (all decided pairs right, ties spread
    evenly over |margin|). Same arguments, same intervals.
    """
    margins, labels = _check_pairs(margins, labels)
    assert num_resamples > 0, "an interval needs at least one resample"
    num_pairs, num_decided = len(labels), int(np.count_nonzero(labels))
    without_ties = with_ties = threshold = sweep = None
    rng = np.random.default_rng(seed)
    if num_decided:
        num_correct = int(_is_correct(margins, labels).sum())
        # Drawing n outcomes that are right or wrong, with replacement, and counting the right ones is a binomial draw.
        resampled = rng.binomial(num_decided, num_correct / num_decided, size=num_resamples) / num_decided
        without_ties = _estimate(num_correct / num_decided, resampled)
    if num_pairs:
        pairs = _sort_pairs(margins, labels)
        threshold, value = _calibrate(pairs)
        with_ties = _estimate(value, _resample_with_ties(pairs, rng, num_resamples=num_resamples))
        sweep = compute_sweep_accuracy(margins, labels)
    return PairAccuracy(num_pairs, num_decided, num_pairs - num_decided, without_ties, with_ties, threshold, sweep)


def calibrate_threshold(margins: Sequence[float], labels: Sequence[int]) -> tuple[float | None, float]:
    """The threshold of the highest accuracy with ties, and that accuracy (tie calibration of Deutsch et al. 2023).

    Candidates are every distinct |margin| and None, which calls no tie; under None a margin of 0 is wrong whatever its
    label. Among equally good ones the one that calls the fewest ties is taken. Fails without pairs.

    Example: margins (0, 0, 2), labels (0, 0, 1): None is right once, 0 three times, 2 twice; (0.0, 1.0).
    """
    return _calibrate(_sort_pairs(*_check_pairs(margins, labels)))


def compute_sweep_accuracy(margins: Sequence[float], labels: Sequence[int]) -> float:
    """The best accuracy met while one pair at a time, by rising |margin|, is turned into a tie, as published tables
    compute accuracy with ties (VideoAlign's calc_accuracy.py, used for VideoGen-RewardBench).

    The state before the first step, where no pair is a tie, does not count: where no tie is best, the figure is up to
    1/n below `calibrate_threshold`'s. Among equal |margin|, in file order, the sweep may stop between pairs that no
    threshold can tell apart: where rewards are coarse, it depends on that order and may be above. Fails without pairs.

    Example: margins (3, -2, 0.5, 0.5), labels (1, 1, 0, 1): after the third pair, now a tie, 3/4. The threshold 0.5
    would take the fourth along: 2/4.
    """
    pairs = _sort_pairs(*_check_pairs(margins, labels))
    return (int(pairs.is_correct.sum()) + int(np.cumsum(pairs.gains).max())) / len(pairs.gains)


def compute_model_table(
    margins: Sequence[float], labels: Sequence[int], models: Sequence[tuple[str, str]]
) -> list[ModelRow]:
    """A row for each generator model, by falling human win rate, then name; models without a decided pair come last.

    `models`: per pair the models of A and of B.

    Example: margins (1, 1), labels (1, -1), models (("x", "y"), ("z", "x")). People give both pairs to x, the rewards
    one, and they are right on that one: ModelRow("x", 2, 0.5, 1.0, 0.5). Then come ModelRow("y", 1, 1.0, 0.0, 0.0) and
    ModelRow("z", 1, 0.0, 0.0, 1.0).
    """
    margins, labels = _check_pairs(margins, labels)
    assert len(models) == len(labels), "one pair of models per pair"
    of_a, of_b = (np.array([pair[side] for pair in models], dtype=object) for side in (0, 1))
    kept = labels != 0
    rows = [_model_row(name, margins[kept], labels[kept], of_a=of_a[kept], of_b=of_b[kept]) for name in {*of_a, *of_b}]
    return sorted(rows, key=lambda row: (row.human_win_rate is None, -(row.human_win_rate or 0.0), row.model))


def _check_pairs(margins: Sequence[float], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n] and int64 [n], or a failure that names what is wrong."""
    margins, labels = np.asarray(margins, dtype=np.float64), np.asarray(labels)
    assert margins.shape == labels.shape == (len(labels),), "one margin and one label per pair"
    assert np.isfinite(margins).all(), "a margin is not finite: leave pairs without a score out"
    assert np.isin(labels, (-1, 0, 1)).all(), "labels are +1, -1 and 0: leave pairs without a label out"
    return margins, labels.astype(np.int64)


def _is_correct(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [n]: the pair is decided and its preferred video has the strictly higher reward."""
    return labels * np.sign(margins) > 0


def _sort_pairs(margins: np.ndarray, labels: np.ndarray) -> _SortedPairs:
    assert len(labels), "no pairs to judge"
    order = np.argsort(np.abs(margins), kind="stable")
    magnitudes, is_correct = np.abs(margins)[order], _is_correct(margins, labels)[order].astype(np.int64)
    return _SortedPairs(
        magnitudes=magnitudes,
        is_correct=is_correct,
        gains=(labels[order] == 0) - is_correct,
        group_ends=np.flatnonzero(np.append(magnitudes[1:] != magnitudes[:-1], True)),
    )


def _count_correct(pairs: _SortedPairs, weights: np.ndarray) -> np.ndarray:
    """int64 [1 + g]: how many pairs are right without a tie, then with each magnitude as the threshold.

    `weights` int64 [n]: how often each of the sorted pairs is there. A magnitude that is not there repeats the count
    before it and so is never the only best one.
    """
    gained = np.cumsum(weights * pairs.gains)[pairs.group_ends]
    return weights @ pairs.is_correct + np.append(0, gained)


def _calibrate(pairs: _SortedPairs) -> tuple[float | None, float]:
    num_correct = _count_correct(pairs, np.ones_like(pairs.gains))
    best = int(num_correct.argmax())  # the first of equals, hence the one with the fewest ties
    threshold = float(pairs.magnitudes[pairs.group_ends[best - 1]]) if best else None
    return threshold, int(num_correct[best]) / len(pairs.gains)


def _resample_with_ties(pairs: _SortedPairs, rng: np.random.Generator, *, num_resamples: int) -> np.ndarray:
    """float64 [num_resamples]: the best accuracy of each resample, which is a weight for each pair; O(n) in memory."""
    num_pairs = len(pairs.gains)
    best = np.empty(num_resamples, dtype=np.int64)
    for index in range(num_resamples):
        weights = np.bincount(rng.integers(num_pairs, size=num_pairs), minlength=num_pairs)
        best[index] = _count_correct(pairs, weights).max()
    return best / num_pairs


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Estimate(value, float(low), float(high))


def _model_row(name: str, margins: np.ndarray, labels: np.ndarray, *, of_a: np.ndarray, of_b: np.ndarray) -> ModelRow:
    """The row of one model; `of_a`, `of_b`: the models of the decided pairs that `margins` and `labels` belong to."""
    takes_part = (of_a == name) | (of_b == name)
    num_decided = int(np.count_nonzero(takes_part))
    if not num_decided:
        return ModelRow(name, 0, None, None, None)
    margins, labels = margins[takes_part], labels[takes_part]
    is_a, is_b = of_a[takes_part] == name, of_b[takes_part] == name
    num_sides = is_a.astype(np.int64) + is_b
    human_win_rate, reward_win_rate = (
        float(np.mean(((is_a & (signs > 0)) | (is_b & (signs < 0))) / num_sides)) for signs in (labels, margins)
    )
    accuracy = float(np.mean(_is_correct(margins, labels)))
    return ModelRow(name, num_decided, accuracy, human_win_rate, reward_win_rate)
