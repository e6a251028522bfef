"""Using a stage 1 checkpoint: scoring, evaluation, merging, and checking data before training."""

from infer_utils.scorer import RewardScorer

__all__ = ["RewardScorer"]
