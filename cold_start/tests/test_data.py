"""The order of pairs, masking, and packed batches."""

from itertools import chain

import torch

from data import MicroBatchSampler, PairDataset, PairDraw, PairFailure
from preference_csv import CsvNeeds, read_pairs
from stage1_support import SMALL_BUDGET, write_pairs_csv

PAIRS, SEED = 13, 7


def draws(*, batch_size, accumulation_steps, world_size, num_steps=8, start_step=0, probability=0.5) -> list[list]:
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
    expected = draws(batch_size=4, accumulation_steps=1, world_size=1)
    for batch_size, accumulation_steps, world_size in ((1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
        assert expected == draws(batch_size=batch_size, accumulation_steps=accumulation_steps, world_size=world_size)


def test_every_epoch_visits_every_pair_once_in_another_order():
    steps = draws(batch_size=1, accumulation_steps=4, world_size=1, num_steps=8)
    epochs = [list(chain.from_iterable(part)) for part in (steps[:4], steps[4:])]
    for epoch in epochs:
        assert sorted(draw.index for draw in epoch) == list(range(PAIRS))
    assert [draw.index for draw in steps[0]] != [draw.index for draw in steps[4]]


def test_resumed_order_continues_the_uninterrupted_one():
    whole = draws(batch_size=1, accumulation_steps=2, world_size=2)
    assert draws(batch_size=1, accumulation_steps=2, world_size=2, start_step=3) == whole[3:]


def test_mask_probability_is_respected_and_bounds_are_exact():
    masked = [
        draw.is_masked
        for step in draws(batch_size=1, accumulation_steps=4, world_size=1, num_steps=400)
        for draw in step
    ]
    assert 0.45 < sum(masked) / len(masked) < 0.55
    for probability in (0.0, 1.0):
        steps = draws(batch_size=1, accumulation_steps=4, world_size=1, probability=probability)
        assert {draw.is_masked for step in steps for draw in step} == {bool(probability)}


def test_batch_holds_both_sequences_of_each_pair_with_its_label(pairs_csv, builder):
    data = PairDataset(read_pairs(pairs_csv, CsvNeeds()), builder, SMALL_BUDGET)
    items = [data[PairDraw(index, False)] for index in (2, 0, 4)]
    batch = data.collate(items)
    bounds = batch.packed.cu_seq_lens.tolist()
    for i, item in enumerate(items):
        for position, sequence in ((batch.a_sequences[i], item.sequence_a), (batch.b_sequences[i], item.sequence_b)):
            assert torch.equal(batch.packed.input_ids[bounds[position] : bounds[position + 1]], sequence.input_ids)
    assert batch.pair_indices.tolist() == [2, 0, 4]
    assert batch.labels.preference.tolist() == [0.0, 1.0, 0.0]
    assert batch.labels.is_valid.tolist() == [True, True, False]


def test_masking_is_shared_by_both_sides_of_a_pair(pairs_csv, builder):
    data = PairDataset(read_pairs(pairs_csv, CsvNeeds()), builder, SMALL_BUDGET)
    shown, masked = data[PairDraw(0, False)], data[PairDraw(0, True)]
    for side in ("sequence_a", "sequence_b"):
        lengths = [getattr(item, side).input_ids.numel() for item in (shown, masked)]
        assert lengths[0] > lengths[1]
        assert getattr(masked, side).input_ids[-3] != getattr(shown, side).input_ids[-3]


def test_undecodable_video_drops_its_whole_pair(tmp_path, clips, builder):
    (tmp_path / "bad.mp4").write_bytes(clips[0].read_bytes()[:2000])
    videos = [repr([str(clips[0]), str(clips[1])]), repr([str(clips[2]), str(tmp_path / "bad.mp4")])]
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"], videos=videos)
    data = PairDataset(read_pairs(path, CsvNeeds()), builder, SMALL_BUDGET)
    items = [data[PairDraw(index, False)] for index in (0, 1)]
    assert isinstance(items[1], PairFailure)
    assert items[1].row == 2
    batch = data.collate(items)
    assert batch.packed.num_sequences == 2
    assert batch.pair_indices.tolist() == [0]
    assert [failure.row for failure in batch.failures] == [2]


def test_batch_without_pairs_runs_but_contributes_nothing(pairs_csv, builder, model):
    data = PairDataset(read_pairs(pairs_csv, CsvNeeds()), builder, SMALL_BUDGET)
    batch = data.collate([])
    assert not batch.labels.is_valid.any()
    assert model(batch.packed).isfinite().all()


def test_fingerprint_follows_the_texts_and_not_the_place_of_the_videos(tmp_path, clips, builder):
    def fingerprint(name, used_clips, **columns):
        path = write_pairs_csv(tmp_path / name, used_clips, labels=["A", "B"], **columns)
        return PairDataset(read_pairs(path, CsvNeeds()), builder, SMALL_BUDGET).fingerprint

    assert fingerprint("one.csv", clips) == fingerprint("two.csv", clips[2:])
    assert fingerprint("one.csv", clips) != fingerprint("three.csv", clips, CoT_A=["other", "texts"])
