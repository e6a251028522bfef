"""Group-relative advantages: how much better a response is than the others to the same video.

A group has its `VideoKey` and a score its `ResponseKey`, so that no reordering can attach a score to another response.
All numbers are Python floats (float64).
"""

import math
from collections.abc import Mapping

from verl.config import AdvantageEstimator
from verl.types import ResponseKey, VideoKey

STD_EPSILON = 1e-6  # keeps the quotient finite for nearly equal scores


def compute_advantages(
    scores: Mapping[ResponseKey, float], *, estimator: AdvantageEstimator
) -> dict[ResponseKey, float]:
    """Advantage of every response, in the order of `scores`.

    With the scores s_1 .. s_n of a group and their mean m:
    `grpo` (Shao et al. 2024, arXiv 2402.03300): (s_i - m) / (std + 1e-6), std with n - 1 in the denominator;
    `rloo` (Ahmadian et al. 2024, arXiv 2402.14740): s_i minus the mean of the other n - 1, without scaling.
    A group of equal scores gets exactly 0.

    Example: grpo of 0, 0, 1, 1 is -0.866, -0.866, 0.866, 0.866 (std 0.577); rloo is -0.667, -0.667, 0.667, 0.667.
    """
    advantages = dict.fromkeys(scores, 0.0)
    for group in group_by_video(scores).values():
        if len(set(group.values())) > 1:
            count = len(group)
            mean = math.fsum(group.values()) / count
            std = math.sqrt(math.fsum((score - mean) ** 2 for score in group.values()) / (count - 1))
            divisor = std + STD_EPSILON if estimator == "grpo" else (count - 1) / count
            advantages |= {key: (score - mean) / divisor for key, score in group.items()}
    return advantages


def group_by_video(scores: Mapping[ResponseKey, float]) -> dict[VideoKey, dict[ResponseKey, float]]:
    """Scores by group."""
    groups: dict[VideoKey, dict[ResponseKey, float]] = {}
    for key, score in scores.items():
        assert math.isfinite(score), f"the score of {key} is {score}"  # the reward function's were checked
        groups.setdefault(key.video, {})[key] = score
    return groups


def compute_group_means(scores: Mapping[ResponseKey, float]) -> dict[VideoKey, float]:
    """Mean score of every group, for online filtering."""
    return {video: math.fsum(group.values()) / len(group) for video, group in group_by_video(scores).items()}
