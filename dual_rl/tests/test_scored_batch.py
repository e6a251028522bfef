"""Choosing among the pairs of a step by their rewards."""

import pytest

from model_support import make_rollout
from verl.trainer.generation import ScoredBatch
from verl.types import ResponseKey


def make_batch(means: dict[int, tuple[float, float]]) -> ScoredBatch:
    """Two responses per video with the rewards m - 0.5 and m + 0.5 for the means of A and B."""
    rollouts = [make_rollout(pair_id, [1, 1], [1, 1]) for pair_id in means]
    rewards = {
        ResponseKey(pair_id, side, sample): {"overall": mean - 0.5 + sample}
        for pair_id, of_sides in means.items()
        for side, mean in zip("AB", of_sides, strict=True)
        for sample in range(2)
    }
    return ScoredBatch(tuple(rollouts), rewards)


def test_a_pair_passes_with_one_group_between_the_limits():
    batch = make_batch({4: (0.0, 0.0), 7: (0.0, 0.5), 2: (1.0, 0.99), 9: (0.2, 1.0)})
    kept = batch.keep_between("overall", 0.01, 0.99)
    assert kept.pair_ids == [7, 9]
    assert {key.pair_id for key in kept.rewards} == {7, 9}


def test_a_filter_key_that_no_reward_has_is_named():
    with pytest.raises(ValueError, match=r"filter_key=overal: .* does not return it\. Choose one of overall"):
        make_batch({0: (0.5, 0.5)}).keep_between("overal", 0.0, 1.0)


def test_extending_takes_new_pairs_only_up_to_the_limit():
    batch = make_batch({1: (0.1, 0.1), 2: (0.2, 0.2)})
    more = make_batch({2: (0.9, 0.9), 3: (0.3, 0.3), 4: (0.4, 0.4)})
    extended = batch.extend(more, limit=3)
    assert extended.pair_ids == [1, 2, 3]
    assert extended.overall[ResponseKey(2, "A", 0)] == pytest.approx(-0.3)
    assert {key.pair_id for key in extended.rewards} == {1, 2, 3}
