"""Group-relative advantages: how much better a response is than the others that were written for the same video.

A group is named by its `VideoKey`, never by the place of its scores in a list, so that no reordering can attach a
score to another response. All numbers are Python floats (float64).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from verl.trainer.config import AdvantageEstimator
from verl.types import ResponseKey, VideoKey

STD_EPSILON = 1e-6  # keeps the quotient finite for nearly equal scores


def compute_advantages(
    scores: Mapping[ResponseKey, float], *, estimator: AdvantageEstimator
) -> dict[ResponseKey, float]:
    """Advantage of every response, in the order of `scores`.

    With the scores s_1 .. s_n of a group and their mean m:
    `grpo` (Shao et al. 2024, arXiv 2402.03300): (s_i - m) / (std + 1e-6), std with n - 1 in the denominator;
    `rloo` (Ahmadian et al. 2024, arXiv 2402.14740): s_i minus the mean of the other n - 1, without scaling.
    A group of equal scores, also of a single response, gets exactly 0. Raises ValueError for another estimator or a
    score that is not finite.

    Example: grpo of 0, 0, 1, 1 is -0.866, -0.866, 0.866, 0.866 (std 0.577); rloo is -0.667, -0.667, 0.667, 0.667.
    """
    if estimator not in ("grpo", "rloo"):
        raise ValueError(f"unknown adv_estimator {estimator!r}; choose grpo or rloo")
    advantages: dict[ResponseKey, float] = {}
    for group in group_by_video(scores).values():
        advantages |= _compute_group_advantages(group, estimator)
    return {key: advantages[key] for key in scores}


def _compute_group_advantages(group: Mapping[ResponseKey, float], estimator: str) -> dict[ResponseKey, float]:
    if _is_constant(group):
        return dict.fromkeys(group, 0.0)
    count = len(group)
    mean = math.fsum(group.values()) / count
    if estimator == "rloo":
        return {key: (score - mean) * count / (count - 1) for key, score in group.items()}
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in group.values()) / (count - 1))
    return {key: (score - mean) / (std + STD_EPSILON) for key, score in group.items()}


def group_by_video(scores: Mapping[ResponseKey, float]) -> dict[VideoKey, dict[ResponseKey, float]]:
    """Scores by group. Raises ValueError naming a response whose score is not finite."""
    groups: dict[VideoKey, dict[ResponseKey, float]] = {}
    for key, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"the score of {key} is {score}; scores must be finite")
        groups.setdefault(key.video, {})[key] = score
    return groups


def compute_group_means(scores: Mapping[ResponseKey, float]) -> dict[VideoKey, float]:
    """Mean score of every group, which online filtering looks at."""
    return {video: math.fsum(group.values()) / len(group) for video, group in group_by_video(scores).items()}


@dataclass(frozen=True)
class GroupStatistics:
    """What the groups of a step can teach: those of equal scores have no gradient. `mean_std` is over all groups."""

    num_groups: int
    num_zero_variance: int
    mean_std: float


def compute_group_statistics(scores: Mapping[ResponseKey, float]) -> GroupStatistics:
    """Number of groups, of groups of equal scores, and the mean unbiased standard deviation (0 for such groups)."""
    groups = group_by_video(scores)
    deviations = []
    for group in groups.values():
        mean = math.fsum(group.values()) / len(group)
        squares = math.fsum((score - mean) ** 2 for score in group.values())
        deviations.append(0.0 if _is_constant(group) else math.sqrt(squares / (len(group) - 1)))
    return GroupStatistics(
        num_groups=len(groups),
        num_zero_variance=sum(_is_constant(group) for group in groups.values()),
        mean_std=math.fsum(deviations) / len(deviations) if deviations else 0.0,
    )


def _is_constant(group: Mapping[ResponseKey, float]) -> bool:
    return len(set(group.values())) == 1
