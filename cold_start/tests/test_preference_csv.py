"""Bad CSVs: each fault is reported with file, row and remedy; sound ones are read as written."""

import shutil

import pandas as pd
import pytest

from checkpoint import RewardConfig
from infer_utils import check_csv
from preference_csv import CsvError, CsvNeeds, load_checked_pairs, read_pairs
from scored_sequence import judge_problem
from stage1_support import SMALL_BUDGET, write_pairs_csv

NEEDS = CsvNeeds()


@pytest.fixture
def edit(pairs_csv):
    """Sets cells of `pairs_csv`: `edit({(row, column): text})`, rows counted from 1."""

    def set_cells(cells: dict[tuple[int, str], str]) -> None:
        table = pd.read_csv(pairs_csv, dtype=str)
        for (row, column), text in cells.items():
            table.loc[row - 1, column] = text
        table.to_csv(pairs_csv, index=False)

    return set_cells


def problems_of(path, budget=SMALL_BUDGET, **options) -> tuple[str, ...]:
    """The faults that are found before training."""
    with pytest.raises(CsvError) as caught:
        load_checked_pairs(path, NEEDS, budget, **{"builder": None, "max_length": 2000, **options})
    return caught.value.problems


def test_paths_are_relative_to_the_csv(tmp_path, clips):
    (tmp_path / "videos").symlink_to(clips[0].parent)
    videos = repr([f"videos/{clips[0].name}", f"videos/{clips[1].name}"])
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A"], videos=[videos])
    assert len(load_checked_pairs(path, NEEDS, SMALL_BUDGET, builder=None, max_length=1)) == 1


def test_prompt_alone_gets_the_judge_prompt_and_one_of_both_is_needed(pairs_csv, edit):
    edit({(2, "problem"): ""})
    assert read_pairs(pairs_csv, NEEDS)[1].problem == judge_problem("a red circle number 1")
    edit({(3, "problem"): " ", (3, "prompt"): " "})
    with pytest.raises(CsvError, match=r"1 fault.*\n  row 3 .*: problem is empty; write the instruction of the judge"):
        read_pairs(pairs_csv, NEEDS)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("GSB", "C", r"GSB: 'C' is not a label. Write A, B, same or invalid"),
        ("videos", "['a.mp4']", "videos is .*; write a list of two paths"),
        ("CoT_A", " ", "a CoT is empty; fill CoT_A and CoT_B, or mask every CoT"),
        *(
            ("MOS_B_GSB", text, f"MOS_B_GSB is '{text}'; write a number from 1 to 5")
            for text in ("good", "nan", "0", "99")
        ),
        ("durations", "[-1.0, 2.0]", "durations is .*; write two durations in seconds"),
    ],
)
def test_bad_cell_is_named_with_row_and_remedy(pairs_csv, edit, column, value, message):
    edit({(2, column): value})
    with pytest.raises(CsvError, match=r"row 2 \(line \d+\): " + message):
        read_pairs(pairs_csv, NEEDS)


def test_scores_that_contradict_the_label_are_faults_for_losses_that_need_them_to_agree(tmp_path, clips):
    scores = {"MOS_A_GSB": [4, 2, 3, 2, 1], "MOS_B_GSB": [2, 2, 1, 4, 5]}
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "B", "same", "invalid"], **scores)
    assert len(read_pairs(path, CsvNeeds(scores=True))) == 5
    with pytest.raises(CsvError, match=r"1 fault.*\n  row 3 .*GSB is 'B' and its scores 3 and 1 say the opposite"):
        read_pairs(path, CsvNeeds(scores=True, agreeing_scores=True))


@pytest.fixture
def broken_csv(tmp_path, clips):
    """Rows with a missing, an empty and a truncated video, and one whose stated duration the file does not reach."""
    content = clips[0].read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "truncated.mp4").write_bytes(content[: len(content) // 2])
    videos = [repr([str(clips[0]), name]) for name in ("none.mp4", "empty.mp4", "truncated.mp4", str(clips[1]))]
    durations = ["", "", "", "[1.0, 60.0]"]
    return write_pairs_csv(tmp_path / "broken.csv", clips, labels=["A"] * 4, videos=videos, durations=durations)


def test_every_bad_video_is_listed_with_its_row(broken_csv, pairs_csv):
    reasons = ["not found", "0 bytes", "does not decode", "shorter than stated"]
    for row, (problem, reason) in enumerate(zip(problems_of(broken_csv), reasons, strict=True), start=1):
        assert problem.startswith(f"row {row}: ")
        assert reason in problem
    problems = problems_of(pairs_csv, SMALL_BUDGET.replace(min_frames=500, max_frames=600))
    assert len(problems) == 12
    assert "at least 500 are needed" in problems[0]


def test_reserved_tokens_and_long_sequences_are_listed(pairs_csv, edit, builder):
    special = {(1, "problem"): "a <video> and <|im_start|>user", (2, "CoT_A"): "so <|endoftext|>"}
    edit({**special, (3, "CoT_B"): "it is <Reward> five", (4, "CoT_A"): "word " * 3000})
    *reserved, long = problems_of(pairs_csv, builder=builder)
    assert reserved == [
        "row 1, video A: problem contains the reserved token '<|im_start|>'; remove it",
        "row 1, video B: problem contains the reserved token '<|im_start|>'; remove it",
        "row 2, video A: CoT contains the reserved token '<|endoftext|>'; remove it",
        "row 3, video B: CoT contains the reserved token '<Reward>'; remove it",
    ]
    assert long.startswith("row 4, video A: ")
    assert "over --max_length 2000; raise --max_length" in long


def run_check(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["check_csv", *map(str, arguments)])
    return check_csv.main()


def test_command_lists_all_kinds_of_faults_at_once(broken_csv, small_base, monkeypatch, capsys):
    table = pd.read_csv(broken_csv, dtype=str)
    pd.concat([table, table.iloc[[0]].assign(GSB="left")]).to_csv(broken_csv, index=False)
    assert run_check(monkeypatch, broken_csv, "--decode", "--model", small_base) == 1
    message = capsys.readouterr().err
    for part in ("5 fault(s)", "row 5 (line ", "row 3: video does not decode"):
        assert part in message


def test_command_counts_the_format_prompt_that_the_model_was_made_for(
    pairs_csv, small_base, tmp_path, monkeypatch, capsys
):
    assert run_check(monkeypatch, pairs_csv, "--decode", "--model", small_base, "--needs_scores") == 0
    assert "6 pairs (2 A, 2 B, 1 invalid, 1 same), 6 videos, no fault" in capsys.readouterr().out
    model = tmp_path / "model"
    shutil.copytree(small_base, model)
    RewardConfig(base_model=None, video=SMALL_BUDGET, format_prompt="{{ content }} <Reward>").save(model)
    assert run_check(monkeypatch, pairs_csv, "--model", model) == 1
    assert "problem contains the reserved token '<Reward>'" in capsys.readouterr().err
