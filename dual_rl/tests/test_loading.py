"""Stage 2's CSV, its videos loaded in threads, and the checks before training; faults name file, row and remedy."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from descore.csv_table import NUM_PROBLEMS_SHOWN, CsvError
from model_support import EXAMPLE_CSV, TINY_BASE
from toy_world.tables import write_table
from verl.config import DataConfig
from verl.data.loading import PairLoader, check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import REWARD_TOKEN, SequenceBuilder, judge_problem
from verl.data.vision_process import VideoBudget, VideoError, load_video
from verl.types import PreferencePair, VideoKey

VIDEOS = "['v/a.mp4', 'v/b.mp4']"
GOOD = {"videos": VIDEOS, "problem": "<video> Judge, please.", "answer": "A"}
BUDGET = VideoBudget(max_frames=6, min_pixels=64 * 64, max_pixels=64 * 64)


def write_csv(folder: Path, rows: list[dict]) -> Path:
    (folder / "v").mkdir(exist_ok=True)
    for video in "ab":
        (folder / "v" / f"{video}.mp4").write_bytes(b"x")
    write_table(folder / "pairs.csv", rows)
    return folder / "pairs.csv"


def read(path: Path, **settings):
    return read_pairs(path, DataConfig(train_files=str(path), **settings))


def test_rows_become_pairs_in_order(tmp_path):
    answers = ["A", "Video 2 is better", "same", "invalid", '{"video_1_scores": {"style": 2}}']
    pairs = read(write_csv(tmp_path, [{**GOOD, "answer": answer} for answer in answers]))
    assert [pair.pair_id for pair in pairs] == [0, 1, 2, 3, 4]
    assert [pair.preference for pair in pairs] == [1, -1, 0, None, None]
    assert [pair.answer for pair in pairs] == answers
    assert pairs[0].problem == GOOD["problem"]
    assert pairs[0].videos == (str(tmp_path / "v" / "a.mp4"), str(tmp_path / "v" / "b.mp4"))


def test_columns_can_be_renamed_and_paths_start_from_the_csv_or_image_dir(tmp_path, monkeypatch):
    row = {"clips": VIDEOS, "question": "Judge.", "label": "B", "unread": "x"}
    names = {"video_key": "clips", "prompt_key": "question", "answer_key": "label"}
    path = write_csv(tmp_path, [row])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = Path("pairs.csv")
    moved.write_bytes(path.read_bytes())
    for pairs in (read(Path("../pairs.csv"), **names), read(moved, **names, image_dir="..")):
        assert (pairs[0].problem, pairs[0].preference) == ("Judge.", -1)
        assert pairs[0].videos[0] == str(tmp_path / "v" / "a.mp4")
    with pytest.raises(CsvError, match=r"column problem is missing; name yours with .*data\.prompt_key"):
        read(path)
    with pytest.raises(CsvError, match=r"data\.image_dir .*absent is not a folder"):
        read(path, **names, image_dir="absent")


def test_prompt_alone_gets_the_built_in_judge_prompt(tmp_path):
    row = {"videos": VIDEOS, "prompt": "a red circle", "answer": "A"}
    path = write_csv(tmp_path, [row])
    assert read(path)[0].problem == judge_problem("a red circle")
    assert read(path, prompt_key="prompt")[0].problem == "a red circle"
    mixed = write_csv(tmp_path, [{**row, "problem": "Judge."}, {**row, "problem": " "}])
    assert [pair.problem for pair in read(mixed)] == ["Judge.", judge_problem("a red circle")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": "v/a.mp4"}, r"videos is 'v/a.mp4'; write a list of two paths"),
        ({"problem": "  "}, "problem is empty; write the instruction"),
        ({"answer": "first"}, "answer: 'first' is not a label. Write A, B, same or invalid"),
    ],
)
def test_all_faulty_cells_name_file_row_line_and_remedy(tmp_path, change, message):
    rows = [{**GOOD, "problem": "three\nlong\nlines"}, *[{**GOOD, **change}] * (NUM_PROBLEMS_SHOWN + 4)]
    with pytest.raises(CsvError, match=rf"pairs\.csv(?s:.*)row 2 \(line 5\): {message}") as raised:
        read(write_csv(tmp_path, rows))
    assert str(raised.value).endswith("... and 4 more")
    assert len(raised.value.problems) == NUM_PROBLEMS_SHOWN + 4


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return SequenceBuilder(processor)


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    pairs = read(EXAMPLE_CSV)
    assert [pair.preference for pair in pairs] == [1, -1, 0, 1]
    return pairs


def make_loader(builder, pairs, *, max_dropped_share=0.0) -> PairLoader:
    return PairLoader(pairs, builder, BUDGET, source="some.csv", max_dropped_share=max_dropped_share)


def broken_pair(pair: PreferencePair, folder: Path, *, pair_id: int) -> PreferencePair:
    """A pair whose video B is cut in the middle of its file."""
    path = folder / f"cut_{pair_id}.mp4"
    path.write_bytes(Path(pair.videos[1]).read_bytes()[:700])
    return replace(pair, pair_id=pair_id, videos=(pair.videos[0], str(path)))


def test_prompts_are_those_of_each_pair_in_order(builder, pairs):
    order = [pairs[2], pairs[0], pairs[3]]
    with make_loader(builder, pairs) as loader:
        loader.prefetch(pairs[:1])
        found = loader.load(order)
    assert [pair for pair, _ in found] == order
    for pair, prompts in found:
        for side, path, prompt in zip("AB", pair.videos, prompts, strict=True):
            expected = builder.encode_prompt(VideoKey(pair.pair_id, side), pair.problem, load_video(path, BUDGET))
            assert (prompt.key, prompt.text, prompt.grid_thw) == (expected.key, expected.text, expected.grid_thw)
            assert torch.equal(prompt.input_ids, expected.input_ids)
            assert torch.equal(prompt.video.frames, expected.video.frames)


def test_pairs_with_a_video_that_fails_are_dropped_whole_and_listed_once(builder, pairs, tmp_path, caplog):
    gone = replace(pairs[1], videos=(str(tmp_path / "gone.mp4"), pairs[1].videos[1]))
    half_gone = [pairs[0], gone, broken_pair(pairs[2], tmp_path, pair_id=7), pairs[3]]
    with make_loader(builder, pairs, max_dropped_share=0.5) as loader, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [pair for pair, _ in loader.load(half_gone)] == [half_gone[0], half_gone[3]]
        first, second = (record.getMessage() for record in caplog.records)
        assert first == f"some.csv: pair dropped: row 2, video A: video not found: {tmp_path / 'gone.mp4'}"
        assert second.startswith("some.csv: pair dropped: row 8, video B: ")
        assert str(tmp_path / "cut_7.mp4") in second
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


def test_overlong_prompts_are_left_out_and_counted_or_errors(builder, pairs, caplog):
    mixed = [pairs[0], replace(pairs[1], problem=pairs[1].problem + " and more" * 100), pairs[2]]
    with make_loader(builder, pairs) as loader:
        lengths = [max(len(prompt.input_ids) for prompt in prompts) for _, prompts in loader.load(mixed)]
    limit = max(lengths[0], lengths[2])
    with caplog.at_level(logging.WARNING):
        assert check(mixed, builder, max_prompt_length=limit) == [pairs[0], pairs[2]]
    expected = f"some.csv: 1 of 3 pairs left out, prompt over {limit} tokens"
    assert [record.getMessage() for record in caplog.records] == [expected]
    with pytest.raises(CsvError, match=f"some.csv: 1 fault.*\n  row 2: prompt of {lengths[1]} tokens"):
        check(mixed, builder, max_prompt_length=lengths[1] - 1, should_filter=False)
    with pytest.raises(CsvError, match=r"some\.csv.*\n.*every prompt is over 10 tokens"):
        check(pairs, builder, max_prompt_length=10)


def test_faults_of_videos_and_texts_are_listed_together(builder, pairs, tmp_path):
    (tmp_path / "empty.mp4").touch()
    faulty = [
        replace(pairs[0], videos=(str(tmp_path / "empty.mp4"), pairs[0].videos[1])),
        replace(pairs[1], problem="a <Reward> token"),
        broken_pair(pairs[2], tmp_path, pair_id=2),
    ]
    with pytest.raises(CsvError) as raised:
        check(faulty, builder)
    lines = raised.value.problems
    expected = ["row 1, video A", "row 2, video A", "row 2, video B", "row 3, video B"]
    assert [line.split(":")[0] for line in lines] == expected
    assert f"video is empty (0 bytes): {tmp_path}/empty.mp4; replace the file or remove the row" in lines[0]
    assert "reserved token '<Reward>'" in lines[1]
