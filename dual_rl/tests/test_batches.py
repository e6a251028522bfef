"""The order of pairs: permutations, what is left out, and resuming."""

import json
import logging

import pytest

from verl.data.batches import BatchStream
from verl.types import PreferencePair

PAIRS = [PreferencePair(i, (f"{i}a.mp4", f"{i}b.mp4"), f"problem {i}", "A", 1) for i in range(10)]


def draw(stream: BatchStream, count: int) -> list[list[int]]:
    return [[pair.pair_id for pair in stream.next_batch()] for _ in range(count)]


def make_stream(*, batch_size=4, shuffle=True, seed=1) -> BatchStream:
    return BatchStream(PAIRS, batch_size=batch_size, shuffle=shuffle, seed=seed)


def test_without_shuffling_pairs_come_in_order_and_the_rest_is_left_out(caplog):
    with caplog.at_level(logging.INFO):
        assert draw(make_stream(shuffle=False), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert [record.getMessage().split(" do not")[0] for record in caplog.records] == ["2 of 10 pairs"]


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
    assert (stream.epoch, stream.batch_in_epoch) == (6, 0)
    first, other = (draw(make_stream(batch_size=batch_size, seed=seed), steps) for seed in (1, 2))
    assert [index for batch in first for index in batch] == epochs[0]
    assert first != other


@pytest.mark.parametrize("num_drawn", range(4))
def test_resumed_stream_goes_on_as_the_uninterrupted_one(num_drawn):
    uninterrupted = make_stream()
    draw(uninterrupted, num_drawn)
    resumed = make_stream()
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    peeked = resumed.peek()
    assert peeked == uninterrupted.peek()
    assert resumed.next_batch() == uninterrupted.next_batch() == peeked
    assert draw(resumed, 6) == draw(uninterrupted, 6)


def test_too_few_pairs_are_an_error():
    with pytest.raises(ValueError, match=r"10 pairs do not fill a batch of 11\. Lower data\.rollout_batch_size"):
        make_stream(batch_size=11)
