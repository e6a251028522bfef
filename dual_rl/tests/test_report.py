"""What is written about a benchmark: rewards in their rows, counts and accuracies worked out by hand, whole files."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from report_support import COLUMNS, REWARDS, make_bench, make_rows
from scoring.bench_csv import Bench, compute_item_id
from scoring.journal import Journal
from scoring.report import format_result, summarise, write_csv
from scoring.types import FailedVideo, ScoredVideo
from toy_world.tables import read_table

PROBLEM = "Judge <video>"
NASTY = ['a "b", c\nd', " , ", '"', "caf\u00e9\r\nx\ry", "", "x"]


def item_id(video: str) -> str:
    return compute_item_id(video, problem=PROBLEM)


def cot_of(video: str) -> str:
    return f'it shows "{video}",\nwhich is\r\n, well, good'


def score(journal: Journal, rewards: Mapping[str, float] = REWARDS, *, failed: Sequence[str] = ("e.mp4",)) -> None:
    for video, reward in rewards.items():
        journal.add(ScoredVideo(item_id(video), reward, cot_of(video), 7, video != "b.mp4"))
    for video in failed:
        journal.add(FailedVideo(item_id(video), f"video is empty: {video}"))


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    with Journal(tmp_path / "scores.rewards.jsonl", {"model": "mine"}) as made:
        yield made


@pytest.fixture
def bench(tmp_path) -> Bench:
    """ROWS, beside a column that is not read and holds everything that CSV has to quote."""
    rows = make_rows(problem=PROBLEM)
    return make_bench(tmp_path, [{"note": note, **row} for note, row in zip(NASTY, rows, strict=True)])


def test_rewards_and_thoughts_are_in_their_rows_beside_all_that_was_there(tmp_path, bench, journal):
    score(journal)
    write_csv(tmp_path / "scores.csv", bench, journal)
    before, after = read_table(Path(bench.path)), read_table(tmp_path / "scores.csv")
    assert list(after[0]) == ["note", *COLUMNS, "problem", "Reward_A", "Reward_B", "CoT_A", "CoT_B"]
    for old, new in zip(before, after, strict=True):
        assert {name: new[name] for name in old} == old
        for side in "AB":
            video = old[f"path_{side}"]
            expected = ("", "") if video == "e.mp4" else (str(REWARDS[video]), cot_of(video))
            assert (new[f"Reward_{side}"], new[f"CoT_{side}"]) == expected


def test_single_videos_have_one_reward_and_every_digit_of_it(tmp_path, journal):
    bench = make_bench(
        tmp_path, [{"video_path": f"{name}.mp4", "problem": PROBLEM} for name in "abca"], "videofeedback"
    )
    score(journal, {"a.mp4": 0.1 + 0.2, "b.mp4": -1e-300}, failed=())
    write_csv(tmp_path / "scores.csv", bench, journal)
    rows = read_table(tmp_path / "scores.csv")
    assert [list(row) for row in rows] == [["video_path", "problem", "Reward", "CoT"]] * 4
    assert [row["Reward"] for row in rows] == ["0.30000000000000004", "-1e-300", "", "0.30000000000000004"]
    summary = summarise(bench, journal, seed=0)
    assert (summary["labels"], summary["num_duplicate_rows"], summary["num_scored"]) == ({}, 1, 2)


def test_a_csv_that_fails_half_way_leaves_the_old_one(tmp_path, bench, journal):
    path = tmp_path / "scores.csv"
    write_csv(path, bench, journal)
    content = path.read_bytes()
    score(journal)
    table = Path(bench.path)
    whole = table.read_bytes()
    table.write_bytes(whole + b"torn\n")
    with pytest.raises(ValueError, match="it has 1 cells"):
        write_csv(path, bench, journal)
    assert path.read_bytes() == content
    table.write_bytes(whole)
    write_csv(path, bench, journal)  # what is left of the failure is in nobody's way
    assert path.read_bytes() != content


def test_the_summary_counts_as_by_hand(bench, journal):
    score(journal)
    summary = summarise(bench, journal, seed=0)
    assert summary == json.loads(json.dumps(summary))
    labels = summary.pop("labels")
    failures = [{"video": bench.items[item_id("e.mp4")].video, "error": "video is empty: e.mp4"}]
    counts = {"num_rows": 6, "num_duplicate_rows": 1, "num_videos": 5, "num_scored": 4, "num_cut": 1}
    assert summary == {**counts, "mean_reward": 2.0, "scale": None, "failures": failures}
    assert list(labels) == ["TA", "Overall"]
    # Margins (2, -1, 0, 2) of rows 1, 2, 3, 5 with labels (1, 1, 0, 1); row 4 lacks a reward, row 6 a label.
    overall, ta = labels["Overall"], labels["TA"]
    numbers = ("num_pairs", "num_decided", "num_ties", "num_unlabelled", "num_unscored", "threshold", "sweep")
    assert [overall[name] for name in numbers] == [4, 3, 1, 1, 1, 0.0, 0.75]
    assert (overall["without_ties"]["value"], overall["with_ties"]["value"]) == (2 / 3, 0.75)
    # Margins (2, 2, -1) of rows 1, 5, 6 with labels (-1, -1, 0); row 6 does not name both models.
    assert [ta[name] for name in numbers] == [3, 2, 1, 3, 0, 1.0, 1 / 3]
    assert ta["without_ties"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [row["model"] for row in ta["models"]] == ["kling", "sora"]
    names = ("model", "num_decided", "accuracy", "human_win_rate", "reward_win_rate")
    rows = [("sora", 3, 2 / 3, 2 / 3, 1.0), ("kling", 3, 2 / 3, 1 / 3, 0.0), ("wan", 0, None, None, None)]
    assert overall["models"] == [dict(zip(names, row, strict=True)) for row in rows]


def test_the_console_shows_these_numbers(bench, journal):
    score(journal)
    lines = format_result(summarise(bench, journal, seed=0)).splitlines()
    assert lines[:3] == [
        "failed: video is empty: e.mp4",
        "6 rows, 5 videos: 4 scored, 1 failed, 1 thoughts cut at the length limit",
        "mean reward 2.0000",
    ]
    ta, overall = (re.split(r"  +", line.strip()) for line in lines[5:7])
    assert ta[:2] + ta[3:] == ["TA", "0.000 [0.000, 0.000]", "1.0000", "0.333", "2 + 1", "0"]
    assert overall[0] + overall[1][:6] + overall[2][:6] == "Overall0.667 0.750 "
    assert overall[3:] == ["0.0000", "0.750", "3 + 1", "1"]
    assert re.split(r"  +", lines[-3].strip()) == ["sora", "3", "0.667", "0.667", "1.000"]
