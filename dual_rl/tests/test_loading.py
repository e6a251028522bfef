"""Loading videos in threads, and the checks before training, on the shipped clips."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from descore.csv_table import CsvError
from verl.config import DataConfig
from verl.data.loading import PairLoader, check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import REWARD_TOKEN, SequenceBuilder
from verl.data.vision_process import VideoBudget, VideoError, load_video
from verl.types import PreferencePair, VideoKey

DUAL_RL = Path(__file__).resolve().parents[1]
EXAMPLE = DUAL_RL / "data" / "example.csv"
BUDGET = VideoBudget(max_frames=6, min_pixels=64 * 64, max_pixels=64 * 64)


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    processor = AutoProcessor.from_pretrained(DUAL_RL.parent / "cold_start" / "model" / "tiny_base")
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return SequenceBuilder(processor)


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    return read_pairs(EXAMPLE, DataConfig(train_files=str(EXAMPLE)))


@pytest.fixture
def loader(builder, pairs):
    with make_loader(builder, pairs) as loader:
        yield loader


def make_loader(builder, pairs, *, max_dropped_share=0.0) -> PairLoader:
    return PairLoader(pairs, builder, BUDGET, source="some.csv", max_dropped_share=max_dropped_share)


def broken_pair(pair: PreferencePair, folder: Path, *, pair_id: int) -> PreferencePair:
    """A pair whose video B is cut in the middle of its file."""
    path = folder / f"cut_{pair_id}.mp4"
    path.write_bytes(Path(pair.videos[1]).read_bytes()[:700])
    return replace(pair, pair_id=pair_id, videos=(pair.videos[0], str(path)))


def test_prompts_are_those_of_each_pair_in_order(loader, builder, pairs):
    order = [pairs[2], pairs[0], pairs[3]]
    loader.prefetch(pairs[:1])
    found = loader.load(order)
    assert [pair for pair, _ in found] == order
    for pair, prompts in found:
        for side, path, prompt in zip("AB", pair.videos, prompts, strict=True):
            expected = builder.encode_prompt(VideoKey(pair.pair_id, side), pair.problem, load_video(path, BUDGET))
            assert (prompt.key, prompt.text, prompt.grid_thw) == (expected.key, expected.text, expected.grid_thw)
            assert torch.equal(prompt.input_ids, expected.input_ids)
            assert torch.equal(prompt.video.frames, expected.video.frames)


def test_videos_are_fetched_once_not_kept_and_tokenised_one_at_a_time(loader, builder, pairs, monkeypatch):
    seen, running, most = [], [], []
    encode = builder.encode_prompt

    def watched(key, *arguments):
        seen.append(key)
        running.append(key)
        most.append(len(running))
        try:
            return encode(key, *arguments)
        finally:
            running.pop()

    monkeypatch.setattr(builder, "encode_prompt", watched)
    loader.prefetch(pairs[:2])
    loader.prefetch(pairs[:2])
    loader.load(pairs[:2])
    assert sorted(seen) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]
    loader.load(pairs[:1])
    assert len(seen) == 6
    assert set(most) == {1}


def test_pairs_with_a_video_that_fails_are_dropped_whole_and_listed_once(builder, pairs, tmp_path, caplog):
    gone = replace(pairs[1], videos=(str(tmp_path / "gone.mp4"), pairs[1].videos[1]))
    half_gone = [pairs[0], gone, broken_pair(pairs[2], tmp_path, pair_id=7), pairs[3]]
    with make_loader(builder, pairs, max_dropped_share=0.5) as loader, caplog.at_level(logging.WARNING):
        for _ in range(2):
            loaded = loader.load(half_gone)
            assert [pair for pair, _ in loaded] == [half_gone[0], half_gone[3]]
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2
        assert said[0] == f"some.csv: pair dropped: row 2, video A: video not found: {tmp_path / 'gone.mp4'}"
        assert said[1].startswith("some.csv: pair dropped: row 8, video B: ")
        assert str(tmp_path / "cut_7.mp4") in said[1]
    with make_loader(builder, pairs, max_dropped_share=0.3) as loader:
        loader.load(half_gone[:2])
        with pytest.raises(VideoError, match=r"(?s)2 of 4 pairs dropped.*row 2.*row 8.*data\.max_dropped_share=0\.3"):
            loader.load(half_gone[2:])
        with pytest.raises(ValueError, match="reserved token"):  # not a video's fault: not dropped
            loader.load([replace(half_gone[0], problem="<Reward>")])


def check(pairs, builder, *, max_prompt_length=1000, should_filter=True):
    return check_pairs(
        pairs, builder, BUDGET, max_prompt_length=max_prompt_length, should_filter=should_filter, source="some.csv"
    )


def test_overlong_prompts_are_left_out_and_counted_or_errors(builder, loader, pairs, caplog):
    mixed = [pairs[0], replace(pairs[1], problem=pairs[1].problem + " and more" * 100), pairs[2]]
    lengths = [max(len(prompt.input_ids) for prompt in prompts) for _, prompts in loader.load(mixed)]
    limit = max(lengths[0], lengths[2])
    with caplog.at_level(logging.WARNING):
        assert check(pairs, builder, should_filter=False) == pairs
        assert not caplog.records
        assert check(mixed, builder, max_prompt_length=limit) == [pairs[0], pairs[2]]
    expected = f"some.csv: 1 of 3 pairs left out, prompt over {limit} tokens"
    assert [record.getMessage() for record in caplog.records] == [expected]
    with pytest.raises(CsvError, match=f"some.csv: 1 fault.*\n  row 2: prompt of {lengths[1]} tokens"):
        check(mixed, builder, max_prompt_length=lengths[1] - 1, should_filter=False)
    with pytest.raises(CsvError, match=r"some\.csv.*\n.*every prompt is over 10 tokens"):
        check(pairs, builder, max_prompt_length=10)


def test_faults_of_videos_and_texts_are_listed_together(builder, pairs, tmp_path):
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    faulty = [
        replace(pairs[0], videos=(str(empty), pairs[0].videos[1])),
        replace(pairs[1], problem="two <video> and <video>"),
        broken_pair(pairs[2], tmp_path, pair_id=2),
        replace(pairs[3], problem="a <Reward> token"),
    ]
    with pytest.raises(CsvError) as raised:
        check(faulty, builder)
    lines = raised.value.problems
    expected = [
        "row 1, video A",
        "row 2, video A",
        "row 2, video B",
        "row 3, video B",
        "row 4, video A",
        "row 4, video B",
    ]
    assert [line.split(":")[0] for line in lines] == expected
    assert f"video is empty (0 bytes): {empty}; replace the file or remove the row" in lines[0]
    assert "reserved token '<Reward>'" in lines[4]
