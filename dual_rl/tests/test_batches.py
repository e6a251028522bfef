"""The order of pairs: permutations, what is left out, and resuming."""

import json
import logging

import pytest

from verl.data.batches import BatchStream
from verl.types import PreferencePair

PAIRS = [PreferencePair(i, (f"{i}a.mp4", f"{i}b.mp4"), f"problem {i}", "A", 1) for i in range(10)]


def draw(stream: BatchStream, count: int) -> list[list[int]]:
    return [[pair.pair_id for pair in stream.next_batch()] for _ in range(count)]


def make_stream(*, pairs=PAIRS, batch_size=4, shuffle=True, seed=1) -> BatchStream:
    return BatchStream(pairs, batch_size=batch_size, shuffle=shuffle, seed=seed)


def test_without_shuffling_pairs_come_in_order_and_the_rest_is_left_out():
    assert draw(make_stream(shuffle=False), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10])
def test_every_epoch_is_a_permutation_of_its_own(batch_size):
    stream = make_stream(batch_size=batch_size)
    steps = 10 // batch_size
    assert stream.steps_per_epoch == steps
    epochs = [[index for batch in draw(stream, steps) for index in batch] for _ in range(6)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * batch_size
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(10))


def test_order_depends_on_the_seed_only():
    assert draw(make_stream(), 9) == draw(make_stream(), 9)
    assert draw(make_stream(), 9) != draw(make_stream(seed=2), 9)


@pytest.mark.parametrize("num_drawn", range(6))
def test_resumed_stream_goes_on_as_the_uninterrupted_one(num_drawn):
    uninterrupted = make_stream()
    draw(uninterrupted, num_drawn)
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    resumed = make_stream()
    resumed.load_state_dict(state)
    assert draw(resumed, 7) == draw(uninterrupted, 7)
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_peek_is_the_next_batch_and_moves_nothing():
    stream = make_stream()
    for _ in range(5):
        state, peeked = stream.state_dict(), stream.peek()
        assert stream.state_dict() == state
        assert stream.next_batch() == peeked


def test_state_says_where_the_stream_stands():
    stream = make_stream()
    draw(stream, 5)
    assert (stream.epoch, stream.batch_in_epoch) == (2, 1)


def test_left_out_pairs_are_said_once(caplog):
    with caplog.at_level(logging.INFO):
        draw(make_stream(), 9)
        draw(make_stream(batch_size=5), 9)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 10 pairs do not fill a batch and are left out, others each epoch"
    ]


def test_too_few_pairs_are_an_error():
    with pytest.raises(ValueError, match=r"10 pairs do not fill a batch of 11\. Lower data\.rollout_batch_size"):
        make_stream(batch_size=11)
