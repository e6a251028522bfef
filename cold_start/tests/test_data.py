"""The order of pairs, masking, and packed batches."""

from itertools import chain

import pytest
import torch

from data import MicroBatchSampler, PairDataset, PairDraw, PairFailure
from preference_csv import CsvNeeds, read_pairs
from stage1_support import SMALL_BUDGET, write_pairs_csv

PAIRS, SEED = 13, 7


def draws(batch_size, accumulation_steps, world_size, *, num_steps=8, start_step=0, probability=0.5) -> list[list]:
    """Draws of each step over all ranks and micro-batches, sorted by pair."""
    steps = [[] for _ in range(num_steps - start_step)]
    for rank in range(world_size):
        sampler = MicroBatchSampler(
            PAIRS,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            world_size=world_size,
            num_steps=num_steps,
            start_step=start_step,
            mask_probability=probability,
            seed=SEED,
        )
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for i, batch in enumerate(batches):
            assert len(batch) <= batch_size
            steps[i // accumulation_steps] += batch
    return [sorted(step, key=lambda draw: draw.index) for step in steps]


def test_steps_hold_the_same_draws_for_any_ranks_and_micro_batches():
    expected = draws(4, 1, 1)
    for sizes in ((1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
        assert draws(*sizes) == expected


def test_every_epoch_visits_every_pair_once_in_another_order():
    steps = draws(1, 4, 1)
    for epoch in (steps[:4], steps[4:]):
        assert sorted(draw.index for draw in chain.from_iterable(epoch)) == list(range(PAIRS))
    assert [draw.index for draw in steps[0]] != [draw.index for draw in steps[4]]


def test_resumed_order_continues_the_uninterrupted_one():
    assert draws(1, 2, 2, start_step=3) == draws(1, 2, 2)[3:]


def test_mask_probability_is_respected_and_bounds_are_exact():
    masked = [draw.is_masked for draw in chain.from_iterable(draws(1, 4, 1, num_steps=400))]
    assert 0.45 < sum(masked) / len(masked) < 0.55
    for probability in (0.0, 1.0):
        steps = draws(1, 4, 1, probability=probability)
        assert {draw.is_masked for draw in chain.from_iterable(steps)} == {bool(probability)}


@pytest.fixture
def data(pairs_csv, builder) -> PairDataset:
    return PairDataset(read_pairs(pairs_csv, CsvNeeds()), builder, SMALL_BUDGET)


def test_batch_holds_both_sequences_of_each_pair_with_its_label(data):
    items = [data[PairDraw(index, False)] for index in (2, 0, 4)]
    batch = data.collate(items)
    bounds = batch.packed.cu_seq_lens.tolist()
    for i, item in enumerate(items):
        for index, sequence in ((batch.a_sequences[i], item.sequence_a), (batch.b_sequences[i], item.sequence_b)):
            assert torch.equal(batch.packed.input_ids[bounds[index] : bounds[index + 1]], sequence.input_ids)
    assert batch.labels.preference.tolist() == [[0.0], [1.0], [0.0]]
    assert batch.labels.is_valid.tolist() == [[True], [True], [False]]


def test_masking_is_shared_by_both_sides_of_a_pair(data):
    shown, masked = data[PairDraw(0, False)], data[PairDraw(0, True)]
    for side in ("sequence_a", "sequence_b"):
        assert getattr(masked, side).input_ids.numel() < getattr(shown, side).input_ids.numel()
        assert getattr(masked, side).input_ids[-3] != getattr(shown, side).input_ids[-3]


def test_undecodable_video_drops_its_whole_pair(tmp_path, clips, builder):
    (tmp_path / "bad.mp4").write_bytes(clips[0].read_bytes()[:2000])
    videos = [repr([str(clips[0]), str(clips[1])]), repr([str(clips[2]), str(tmp_path / "bad.mp4")])]
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"], videos=videos)
    data = PairDataset(read_pairs(path, CsvNeeds()), builder, SMALL_BUDGET)
    items = [data[PairDraw(index, False)] for index in (0, 1)]
    assert isinstance(items[1], PairFailure)
    batch = data.collate(items)
    assert batch.packed.num_sequences == 2
    assert batch.labels.preference.tolist() == [[1.0]]
    assert [failure.row for failure in batch.failures] == [2]


def test_batch_without_pairs_runs_but_contributes_nothing(data, model):
    batch = data.collate([])
    assert not batch.labels.is_valid.any()
    assert model(batch.packed).isfinite().all()


def test_fingerprint_follows_the_texts_and_not_the_paths_of_the_videos(tmp_path, clips, builder):
    def fingerprint(used_clips, **columns):
        path = write_pairs_csv(tmp_path / "pairs.csv", used_clips, labels=["A", "B"], **columns)
        return PairDataset(read_pairs(path, CsvNeeds()), builder, SMALL_BUDGET).fingerprint

    assert fingerprint(clips) == fingerprint(clips[2:])
    assert fingerprint(clips) != fingerprint(clips, CoT_A=["other", "texts"])
