"""Reading the stage 2 CSV: what is accepted, and faults that name file, row and remedy."""

import ast
import csv
from pathlib import Path

import pytest

from descore.csv_table import NUM_PROBLEMS_SHOWN, CsvError
from make_toy_world import sample_example
from scored_sequence import judge_problem as stage1_judge_problem
from toy_world.tables import read_table, rl_row, training_row
from toy_world.world import WorldConfig
from verl.config import DataConfig
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import judge_problem

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
STAGE1_EXAMPLE = DATA_DIR.parents[1] / "cold_start" / "datasets" / "train"
VIDEOS = "['v/a.mp4', 'v/b.mp4']"
GOOD = {"videos": VIDEOS, "problem": "<video> Judge, please.", "answer": "A"}


def write_csv(folder: Path, rows: list[dict], *, name="pairs.csv", header=None) -> Path:
    (folder / "v").mkdir(exist_ok=True)
    for video in "ab":
        (folder / "v" / f"{video}.mp4").write_bytes(b"x")
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


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


def test_paths_start_from_the_csv_or_image_dir_and_are_absolute(tmp_path, monkeypatch):
    path = write_csv(tmp_path, [GOOD])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert read(Path("../pairs.csv"))[0].videos[0] == str(tmp_path / "v" / "a.mp4")
    moved = elsewhere / "pairs.csv"
    moved.write_bytes(path.read_bytes())
    assert read(moved)[0].videos[0] == str(elsewhere / "v" / "a.mp4")
    assert read(moved, image_dir="..")[0].videos[0] == str(tmp_path / "v" / "a.mp4")


def test_columns_can_be_renamed(tmp_path):
    row = {"clips": VIDEOS, "question": "Judge.", "label": "B", "unread": "x"}
    pairs = read(write_csv(tmp_path, [row]), video_key="clips", prompt_key="question", answer_key="label")
    assert (pairs[0].problem, pairs[0].preference) == ("Judge.", -1)


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
def test_faulty_cells_name_file_row_line_and_remedy(tmp_path, change, message):
    rows = [{**GOOD, "problem": "three\nlong\nlines"}, {**GOOD, **change}]
    with pytest.raises(CsvError, match=message) as raised:
        read(write_csv(tmp_path, rows))
    assert str(tmp_path / "pairs.csv") in str(raised.value)
    assert "row 2 (line 5): " in str(raised.value)


def test_all_faults_are_counted_and_the_first_are_shown(tmp_path):
    num_faults = NUM_PROBLEMS_SHOWN + 4
    with pytest.raises(CsvError, match=r"\.\.\. and 4 more$") as raised:
        read(write_csv(tmp_path, [GOOD] + [{**GOOD, "answer": "?"}] * num_faults))
    assert len(raised.value.problems) == num_faults


def test_missing_columns_and_folders_name_the_setting(tmp_path):
    good = write_csv(tmp_path, [GOOD])
    with pytest.raises(CsvError, match=r"column question is missing; name yours with .*data\.prompt_key"):
        read(good, prompt_key="question")
    with pytest.raises(CsvError, match=r"data\.image_dir .*absent is not a folder"):
        read(good, image_dir=str(tmp_path / "absent"))


def test_shipped_example_is_what_the_toy_world_makes_and_is_read():
    rows, pairs = read_table(DATA_DIR / "example.csv"), sample_example(WorldConfig())
    assert rows == [rl_row(pair, stage1_judge_problem(pair.prompt)) for pair in pairs]
    stage1_rows = read_table(STAGE1_EXAMPLE / "example.csv")
    for pair, row in zip(pairs, stage1_rows, strict=True):
        expected = training_row(pair, stage1_judge_problem(pair.prompt))
        assert {name: str(value) for name, value in expected.items()} == row
    for row in rows:
        for video in ast.literal_eval(row["videos"]):
            assert (DATA_DIR / video).read_bytes() == (STAGE1_EXAMPLE / video).read_bytes()
    assert [pair.preference for pair in read(DATA_DIR / "example.csv")] == [1, -1, 0, 1]
