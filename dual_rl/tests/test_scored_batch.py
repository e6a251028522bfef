"""Choosing among the pairs of a step by their rewards."""

import pytest
import torch

from verl.trainer.generation import ScoredBatch
from verl.types import PairRollout, PreferencePair, Response, ResponseKey


def make_batch(means: dict[int, tuple[float, float]]) -> ScoredBatch:
    """Two responses per video with the rewards m - 0.5 and m + 0.5 for the means of A and B."""
    rollouts, rewards = [], {}
    for pair_id, sides in means.items():
        keys = [[ResponseKey(pair_id, side, sample) for sample in range(2)] for side in "AB"]
        responses = [tuple(Response(key, (1,), True, torch.zeros(2)) for key in of_side) for of_side in keys]
        pair = PreferencePair(pair_id, ("a.mp4", "b.mp4"), "problem", "A", 1)
        rollouts.append(PairRollout(pair, *responses, prompt_tokens=(3, 3)))
        for of_side, mean in zip(keys, sides, strict=True):
            rewards |= {key: {"overall": mean + shift} for key, shift in zip(of_side, (-0.5, 0.5), strict=True)}
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
