"""How well rewards agree with human preferences on a benchmark of video pairs. Pure: numpy only.

Everywhere `margins` is float64 [n], the reward of A minus the reward of B, and `labels` is int [n]: +1 where people
prefer A, -1 where they prefer B, 0 for a tie. The caller leaves out pairs without a label or a score.

Accuracy with ties needs a margin below which the rewards call a tie, too. It is calibrated on the pairs that it is
tested on, as Deutsch, Foster and Freitag (2023, "Ties Matter") propose, so it is biased upward. Published tables of
video reward models turn one pair at a time into a tie, where the paper moves equal margins together: `sweep`.
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

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairAccuracy:
    """Agreement over `num_pairs` pairs, `num_decided` with a human preference and `num_ties` without.

    `without_ties`: share of the decided pairs whose preferred video has the strictly higher reward; None without any.
    `with_ties`: share of all pairs judged right if |margin| <= `threshold` is called a tie. `threshold` is the best of
    all |margin| and None, which calls no tie; of equally good ones, the one that calls the fewest.
    `sweep`: the best share met while one pair at a time, by rising |margin| and then file order, becomes a tie
    (VideoAlign's calc_accuracy.py, used for VideoGen-RewardBench). It starts with one tie, so it may be up to 1/n
    below `with_ties`; it may stop between equal margins, which no threshold can, so it may also be above.

    Example: margins (3, -2, 0.5, 0.25) with labels (1, 1, 0, 0) are 1/2 without ties, and with ties 3/4 at 0.5.
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

    Shares of these pairs, None without any: on which the rewards agree with people, that people give to the model, in
    which the model's video has the strictly higher reward. A pair of a model with itself counts once, half a win.
    """

    model: str
    num_decided: int
    accuracy: float | None
    human_win_rate: float | None
    reward_win_rate: float | None


def compute_pair_accuracy(
    margins: Sequence[float], labels: Sequence[int], *, num_resamples: int = 1000, seed: int = 0
) -> PairAccuracy:
    """All of `PairAccuracy`. Intervals come from `num_resamples` draws of as many pairs with replacement.

    Every resample calibrates its own threshold, so resampled accuracies are biased upward more than `value` is: it
    tends to be below the middle of its interval, in contrived cases below `low`. Same arguments, same intervals.
    """
    margins, labels = _check_pairs(margins, labels)
    num_pairs, num_decided = len(labels), int(np.count_nonzero(labels))
    rng = np.random.default_rng(seed)
    without_ties, tied = None, (None, None, None)
    if num_decided:
        share = int(_is_correct(margins, labels).sum()) / num_decided
        # Drawing n right or wrong outcomes with replacement and counting the right ones is a binomial draw.
        without_ties = _estimate(share, rng.binomial(num_decided, share, size=num_resamples) / num_decided)
    if num_pairs:
        tied = _compute_with_ties(margins, labels, rng, num_resamples)
    return PairAccuracy(num_pairs, num_decided, num_pairs - num_decided, without_ties, *tied)


def _compute_with_ties(
    margins: np.ndarray, labels: np.ndarray, rng: np.random.Generator, num_resamples: int
) -> tuple[Estimate, float | None, float]:
    """`with_ties`, `threshold` and `sweep` of `PairAccuracy`, for at least one pair."""
    num_pairs, order = len(labels), np.argsort(np.abs(margins), kind="stable")
    magnitudes, is_correct = np.abs(margins)[order], _is_correct(margins, labels)[order].astype(np.int64)
    gains = (labels[order] == 0) - is_correct  # what calling the pair a tie adds
    ends = np.flatnonzero(np.append(np.diff(magnitudes) > 0, True))  # the last pair of each group of equal magnitudes

    def count_correct(weights: np.ndarray) -> np.ndarray:
        """int64 [1 + groups]: right pairs without a called tie, then with each magnitude as the threshold.

        `weights` int64 [n]: how often each of the sorted pairs counts. The magnitude of a pair with weight 0 repeats
        the count before it and so is never the only best one.
        """
        return weights @ is_correct + np.append(0, np.cumsum(weights * gains)[ends])

    counts = count_correct(np.ones_like(gains))
    best = int(counts.argmax())  # of equals, the first has the fewest ties
    threshold = float(magnitudes[ends[best - 1]]) if best else None
    draws = (rng.integers(num_pairs, size=num_pairs) for _ in range(num_resamples))
    resampled = [count_correct(np.bincount(draw, minlength=num_pairs)).max() for draw in draws]
    sweep = (int(is_correct.sum()) + int(np.cumsum(gains).max())) / num_pairs
    return _estimate(int(counts[best]) / num_pairs, np.array(resampled) / num_pairs), threshold, sweep


def compute_model_table(
    margins: Sequence[float], labels: Sequence[int], models: Sequence[tuple[str, str]]
) -> list[ModelRow]:
    """A row per generator model, by falling human win rate, then name; models without a decided pair come last.

    `models`: per pair the models of A and of B.
    """
    margins, labels = _check_pairs(margins, labels)
    sides = np.array(models, dtype=object).reshape(-1, 2)
    names, decided = set(sides.flat), labels != 0
    sides, margins, labels = sides[decided], margins[decided], labels[decided]
    is_correct = _is_correct(margins, labels)
    won_by_people, won_by_reward = (np.stack([values > 0, values < 0], axis=1) for values in (labels, margins))
    rows = []
    for name in names:
        is_own = sides == name  # bool [decided, 2]
        kept = is_own.any(axis=1)
        wins = [(is_own & won)[kept].sum(axis=1) / is_own[kept].sum(axis=1) for won in (won_by_people, won_by_reward)]
        shares = [float(np.mean(share)) if len(share) else None for share in (is_correct[kept], *wins)]
        rows.append(ModelRow(name, int(kept.sum()), *shares))
    return sorted(rows, key=lambda row: (row.human_win_rate is None, -(row.human_win_rate or 0.0), row.model))


def _check_pairs(margins: Sequence[float], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    margins, labels = np.asarray(margins, dtype=np.float64), np.asarray(labels)
    assert margins.shape == labels.shape == (len(labels),), "one margin and one label per pair"
    assert np.isfinite(margins).all(), "a margin is not finite: leave pairs without a score out"
    assert np.isin(labels, (-1, 0, 1)).all(), "labels are +1, -1 and 0: leave pairs without a label out"
    return margins, labels.astype(np.int64)


def _is_correct(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [n]: the pair is decided and its preferred video has the strictly higher reward."""
    return labels * np.sign(margins) > 0


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Estimate(value, float(low), float(high))
