"""The pairs of a step: their order, who is kept, over which ranks they go, and the advantages of their responses."""

import json
import logging
import random
from itertools import product

import numpy as np
import pytest

from model_support import make_pair, make_rollout
from verl.core.advantages import STD_EPSILON, compute_advantages, compute_group_means
from verl.core.balancing import balance_pairs
from verl.data.batches import BatchStream
from verl.trainer.generation import ScoredBatch
from verl.types import ResponseKey, VideoKey


def draw(stream: BatchStream, count: int) -> list[list[int]]:
    return [[pair.pair_id for pair in stream.next_batch()] for _ in range(count)]


def make_stream(*, batch_size=4, shuffle=True, seed=1) -> BatchStream:
    return BatchStream([make_pair(i) for i in range(10)], batch_size=batch_size, shuffle=shuffle, seed=seed)


def test_without_shuffling_pairs_come_in_order_and_the_rest_is_left_out(caplog):
    with caplog.at_level(logging.INFO):
        assert draw(make_stream(shuffle=False), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert [record.getMessage().split(" do not")[0] for record in caplog.records] == ["2 of 10 pairs"]
    with pytest.raises(ValueError, match=r"10 pairs do not fill a batch of 11\. Lower data\.rollout_batch_size"):
        make_stream(batch_size=11)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_every_epoch_is_a_permutation_of_its_own_that_depends_on_the_seed_only(batch_size):
    stream = make_stream(batch_size=batch_size)
    steps = 10 // batch_size
    assert stream.steps_per_epoch == steps
    epochs = [[index for batch in draw(stream, steps) for index in batch] for _ in range(6)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * batch_size
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(10))
    first, other = (draw(make_stream(batch_size=batch_size, seed=seed), steps) for seed in (1, 2))
    assert [index for batch in first for index in batch] == epochs[0]
    assert first != other


@pytest.mark.parametrize("num_drawn", range(4))
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(num_drawn):
    uninterrupted = make_stream()
    draw(uninterrupted, num_drawn)
    resumed = make_stream()
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    peeked = resumed.peek()
    assert peeked == uninterrupted.peek()
    assert resumed.next_batch() == uninterrupted.next_batch() == peeked
    assert draw(resumed, 6) == draw(uninterrupted, 6)


def make_batch(means: dict[int, tuple[float, float]]) -> ScoredBatch:
    """Two responses per video with the rewards m - 0.5 and m + 0.5 for the means of A and B."""
    rewards = {
        ResponseKey(pair_id, side, sample): {"overall": mean - 0.5 + sample}
        for pair_id, of_sides in means.items()
        for side, mean in zip("AB", of_sides, strict=True)
        for sample in range(2)
    }
    return ScoredBatch(tuple(make_rollout(pair_id, [1, 1], [1, 1]) for pair_id in means), rewards)


def test_online_filtering_keeps_pairs_with_a_group_between_the_limits():
    batch = make_batch({4: (0.0, 0.0), 7: (0.0, 0.5), 2: (1.0, 0.99), 9: (0.2, 1.0)})
    kept = batch.keep_between("overall", 0.01, 0.99)
    assert kept.pair_ids == [7, 9]
    assert {key.pair_id for key in kept.rewards} == {7, 9}
    assert kept.extend(make_batch({7: (0.9, 0.9), 3: (0.3, 0.3), 5: (0.4, 0.4)}), limit=3).pair_ids == [7, 9, 3]
    with pytest.raises(ValueError, match=r"filter_key=overal: .* does not return it\. Choose one of overall"):
        batch.keep_between("overal", 0.0, 1.0)


@pytest.mark.parametrize(("num_pairs", "num_ranks"), [(0, 2), (1, 8), (5, 3), (64, 8), (5, 1)])
def test_every_pair_goes_to_exactly_one_rank(num_pairs, num_ranks):
    num_tokens = np.random.default_rng(num_pairs).integers(100, 4000, num_pairs).tolist()
    partition = balance_pairs(num_tokens, num_ranks)
    assert len(partition) == num_ranks
    assert sorted(index for indices in partition for index in indices) == list(range(num_pairs))
    assert all(indices == sorted(indices) for indices in partition)
    assert sum(map(bool, partition)) == min(num_pairs, num_ranks)


def test_loads_of_ranks_are_close_to_the_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_tokens = rng.integers(100, 1000, 7).tolist()
        loads = (max(np.bincount(ranks, weights=num_tokens, minlength=3)) for ranks in product(range(3), repeat=7))
        heaviest = max(sum(num_tokens[index] for index in indices) for indices in balance_pairs(num_tokens, 3))
        assert heaviest <= 1.1 * min(loads)
    assert balance_pairs((8, 7, 6, 5, 4), 2) == [[0, 2], [1, 3, 4]]  # of the docstring
    assert sorted(balance_pairs([1000, 1, 0, 1], 4)) == [[0], [1], [2], [3]]  # none empty beside a huge pair


def make_scores(groups: dict[tuple[int, str], list[float]]) -> dict[ResponseKey, float]:
    return {ResponseKey(*video, i): s for video, scores in groups.items() for i, s in enumerate(scores)}


@pytest.mark.parametrize(
    ("estimator", "scores", "expected"),
    [
        # mean 0.5, unbiased variance 1 / 3, std 0.57735: +-0.5 / 0.577351
        ("grpo", [0.0, 0.0, 1.0, 1.0], [-0.8660239, -0.8660239, 0.8660239, 0.8660239]),
        ("rloo", [1.0, 2.0, 6.0], [1 - 4.0, 2 - 3.5, 6 - 1.5]),  # the score less the mean of the others
    ],
)
def test_advantages_equal_hand_computed_values(estimator, scores, expected):
    advantages = compute_advantages(make_scores({(0, "A"): scores}), estimator=estimator)
    assert list(advantages.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scores", [[0.1] * 7, [0.7], [0.1 + 0.2, 0.1 + 0.2], [0.0, -0.0]])
def test_a_group_of_equal_scores_gets_exactly_zero(estimator, scores):
    advantages = compute_advantages(make_scores({(0, "B"): scores, (1, "B"): [1.0, 2.0]}), estimator=estimator)
    assert [advantages[ResponseKey(0, "B", i)] for i in range(len(scores))] == [0.0] * len(scores)


def test_advantages_agree_with_numpy_and_follow_their_keys_through_any_order():
    rng = np.random.default_rng(0)
    groups = {(pair, side): rng.random(8).round(2).tolist() for pair in range(5) for side in "AB"}
    items = list(make_scores(groups).items())
    random.Random(0).shuffle(items)
    advantages, means = compute_advantages(dict(items), estimator="grpo"), compute_group_means(dict(items))
    assert list(advantages) == [key for key, _ in items]
    for video, scores in groups.items():
        expected = (np.array(scores) - np.mean(scores)) / (np.std(scores, ddof=1) + STD_EPSILON)
        assert [advantages[ResponseKey(*video, i)] for i in range(8)] == pytest.approx(expected.tolist(), abs=1e-12)
        assert means[VideoKey(*video)] == pytest.approx(np.mean(scores))
    with pytest.raises(AssertionError, match=r"pair_id=2.*nan"):
        compute_advantages(make_scores({(2, "A"): [0.0, float("nan")]}), estimator="grpo")
