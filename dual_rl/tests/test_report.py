"""What is written about a benchmark: rewards in their rows, counts by hand, and a page that is complete and inert."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from model_support import EXAMPLE_CSV
from scoring.bench_csv import Bench, BenchType, compute_item_id, read_bench
from scoring.html_report import main, write_report
from scoring.journal import Journal
from scoring.report import format_result, summarise, write_csv
from scoring.report_charts import build_calibration, sigmoid
from scoring.source import RewardScale
from scoring.types import FailedVideo, ScoredVideo
from toy_world.tables import read_table, write_table

REWARDS = {"a.mp4": 3.0, "b.mp4": 1.0, "c.mp4": 2.0, "d.mp4": 2.0}
COLUMNS = ("path_A", "path_B", "A_model", "B_model", "TA", "Overall")
ROWS = [
    ("a.mp4", "b.mp4", "sora", "kling", "B", "A"),
    ("b.mp4", "c.mp4", "kling", "sora", "", "A"),
    ("c.mp4", "d.mp4", "sora", "wan", "nan", "same"),
    ("a.mp4", "e.mp4", "sora", "kling", "", "A"),
    ("a.mp4", "b.mp4", "sora", "kling", "B", "A"),
    ("d.mp4", "a.mp4", "", "sora", "same", "invalid"),
]
"""Of COLUMNS; e.mp4 has no reward."""
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def make_rows(rows: Sequence[Sequence[str]] = ROWS, **cells: str) -> list[dict[str, str]]:
    """With more `cells`, the same in each row."""
    return [dict(zip(COLUMNS, row, strict=True)) | cells for row in rows]


def make_bench(folder: Path, rows: Sequence[Mapping[str, str]], bench_type: BenchType = "videoalign") -> Bench:
    """A benchmark beside empty videos, unless they are there."""
    for video in {row[name] for row in rows for name in row if name.startswith(("path_", "video_path"))}:
        (folder / video).touch()
    write_table(folder / "bench.csv", rows)
    return read_bench(folder / "bench.csv", bench_type)


def read_data(page: str) -> dict:
    """What a page embeds."""
    return json.loads(DATA.search(page)[1])


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
    console = format_result(summarise(bench, journal, seed=0))
    assert (
        "6 rows, 5 videos: 4 scored, 1 failed, 1 with a thought cut at the length limit\nmean reward 2.0000" in console
    )
    assert re.search(r"Overall +0\.667 \[.*\] +0\.750 \[.*\] +0\.0000 +0\.750 +3 \+ 1 +1$", console, re.MULTILINE)
    assert re.search(r"sora +3 +0\.667 +0\.667 +1\.000$", console, re.MULTILINE)


HOSTILE = [
    "</script><script>alert(1)</script><!-- <script>",
    "<img src=http://127.0.0.1/x onerror=alert(1)> &lt; &amp; \\u003c",
    "line\r\nline\n\ttab\u2028\u2029\0 end",
    "caf\u00e9 \U0001f600 half \ud83d",
    "{{ data }} {% raw %} ${x} `",
    '<answer>{"dimensional_scores": {"<b>": NaN, "x": [1, "</script>"]}}</answer>',
]
PAIRS = [*ROWS[:2], ("c.mp4", "d.mp4", "sora", "wan", "A", "same"), ROWS[3]]


def bench_of(folder: Path, rows: Sequence[Sequence[str]] = PAIRS) -> Bench:
    return make_bench(folder, make_rows(rows, prompt="a red cat"))


def report(folder: Path, bench: Bench, rewards: Mapping[str, float] = REWARDS, thoughts=("",), scale=None) -> str:
    """The page of a run that gave these rewards and, in turn, these thoughts."""
    with Journal(folder / "out.rewards.jsonl", {}, overwrite=True) as journal:
        for index, item in enumerate(bench.items.values()):
            name = os.path.basename(item.video)
            if name in rewards:
                thought = thoughts[index % len(thoughts)]
                journal.add(ScoredVideo(item.name, rewards[name], thought, 9, name != "b.mp4"))
            else:
                journal.add(FailedVideo(item.name, f"video is empty: {name}"))
        write_report(folder / "out.html", bench, journal, summarise(bench, journal, seed=0, scale=scale))
    return (folder / "out.html").read_text(encoding="utf-8")


def test_the_page_shows_what_was_scored(tmp_path):
    page = report(tmp_path, bench_of(tmp_path))
    data = read_data(page)
    assert data["views"][data["main"]]["name"] == "Overall"
    assert [view["verdicts"] for view in data["views"]] == [
        ["wrong", "unlabelled", "wrong", "unscored"],
        ["right", "wrong", "tie", "unscored"],
    ]
    numbers = [[2.0, 2.0, 3.0, 1.0], [-1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 2.0, 2.0], [None, None, 3.0, None]]
    assert [row["numbers"] for row in data["rows"]] == numbers
    assert data["rows"][0]["summary"] == "margin +2.0000, P(A is better) 0.881"
    assert (data["rows"][0]["facets"], data["prompts"]) == ([["sora", "kling"]], ["a red cat"])
    notes = {item["name"]: item["note"] for item in data["items"]}
    assert (notes["e.mp4"], notes["a.mp4"]) == ("video is empty: e.mp4", "")
    assert notes["b.mp4"].startswith("cut at the length limit")
    assert data["tables"][0]["rows"][1][5:] == ["2 + 1", "1"]
    assert data["views"][1]["tables"][0]["rows"][0][:2] == ["kling", "2"]
    for shown in ("<h1>videoalign: bench.csv</h1>", "<summary>1 failed</summary><pre>video is empty: e.mp4</pre>"):
        assert shown in page
    assert re.findall(r'<option value="(\w+)">\1</option>', page) == ["kling", "sora", "wan"]

    scale = RewardScale(mean=1.0, std=2.0, num_videos=9, data="val.csv", weights="w", video={"fps": 2.0})
    page = report(tmp_path, bench_of(tmp_path), scale=scale)
    data = read_data(page)
    assert data["rows"][0]["numbers"] == [1.0, 1.0, 1.0, 0.0]
    assert data["rows"][0]["summary"] == "margin +1.0000, P(A is better) 0.881"
    assert "9 videos of val.csv, 1.0000 +- 2.0000" in page
    assert data["views"][1]["charts"][1]["points"][-1]["x"] == sigmoid(2.0)


def test_hostile_text_comes_back_unchanged_and_makes_no_element(tmp_path):
    rows = [(f"{n}.mp4", f"{n + 1}.mp4", "<b>x</b>", "'\"", "A", "A") for n in range(6)]
    page = report(tmp_path, bench_of(tmp_path, rows), {f"{n}.mp4": float(n) for n in range(7)}, HOSTILE)
    harmless = [(*row[:2], "x", "y", "A", "A") for row in rows]
    plain = report(tmp_path, bench_of(tmp_path, harmless), {f"{n}.mp4": float(n) for n in range(7)})
    data = read_data(page)
    assert [item["thought"] for item in data["items"][:6]] == HOSTILE
    assert data["rows"][0]["models"] == ["<b>x</b>", "'\""]
    assert data["items"][5]["scores"] == {"score": {"<b>": "nan", "x": "[1, '</script>']"}}
    tags = [re.findall(r"<[/!a-z]+", DATA.sub("", text)) for text in (page, plain)]
    assert tags[0] == tags[1]
    assert "<" not in DATA.search(page)[1]


def test_the_page_names_nothing_outside_and_its_policy_lets_only_its_own_script_run(tmp_path):
    pages = [DATA.sub("", report(tmp_path, bench_of(tmp_path))) for _ in range(2)]
    assert re.search(r"https?:|//|@import|url\((?!#)", pages[0]) is None
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", pages[0])
    policies = [re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1] for page in pages]
    assert policies[0] != policies[1]  # a nonce that can be guessed protects nothing
    rules = dict(rule.split(" ", 1) for rule in policies[0].split("; "))
    assert (rules["default-src"], rules["media-src"]) == ("'none'", "'self' file:")
    for tag in ("script", "style"):
        nonce = re.search(f'<{tag} nonce="([0-9a-f]{{32}})">', pages[0])[1]
        assert rules[f"{tag}-src"] == f"'nonce-{nonce}'"


def test_clips_are_found_from_another_folder_whatever_they_are_called(tmp_path):
    names = ["a b.mp4", "50%#1?.mp4", "c:d.mp4", "caf\u00e9.mp4"]
    (tmp_path / "data").mkdir()
    bench = bench_of(tmp_path / "data", [(names[0], names[1], "", "", "A", "A"), (*names[2:], "", "", "A", "A")])
    with Journal(tmp_path / "out.rewards.jsonl", {}) as journal:
        for folder, start in (("new/pages", "../../data/"), ("data", "")):
            path = tmp_path / folder / "out.html"
            write_report(path, bench, journal, summarise(bench, journal, seed=0))
            items = read_data(path.read_text())["items"]
            assert [item["name"] for item in items] == [start + name for name in names]
            urls = [urljoin(path.as_uri(), item["clip"]) for item in items]
            assert [unquote(urlsplit(url).path) for url in urls] == [str(tmp_path / "data" / name) for name in names]


def test_generations_of_training_are_shown_by_step_beside_the_annotation_and_their_clips(tmp_path):
    source, page = tmp_path / "generations.jsonl", tmp_path / "out.html"
    problem = read_table(EXAMPLE_CSV)[0]["problem"]
    thought = '<answer>{"dimensional_scores": {"style": 1}}</answer>'
    answer = '<answer>{"video_1_scores": {"style": 2}, "video_2_scores": {"style": 0}}</answer>'
    rows = [
        {"step": step, "pair_id": 0, "side": side, "sample": 0, "reward/overall": reward, "reward/sub": 0.5}
        | {"prompt": problem, "response": thought if side == "A" else "hm", "head_reward": None, "answer": answer}
        for step in (0, 20)
        for side, reward in (("A", 0.5), ("B", None))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "torn', encoding="utf-8")
    assert main([str(source), "--output", str(page), "--data", str(EXAMPLE_CSV)]) == 0
    data = read_data(page.read_text())
    numbers = [[0, 0.5, None], [0, None, None], [20, 0.5, None], [20, None, None]]
    assert [row["numbers"] for row in data["rows"]] == numbers
    assert data["views"][0]["verdicts"] == ["well-formed", "malformed"] * 2
    assert [item["scores"] for item in data["items"][:2]] == [
        {"model": {"style": "1"}, "annotators": {"style": "2"}},
        {"model": {}, "annotators": {"style": "0"}},
    ]
    assert data["rows"][0]["summary"] == "step 0, sample 0, overall 0.5, sub 0.5"
    assert [row["facets"] for row in data["rows"][1:3]] == [[["0"], ["B"]], [["20"], ["A"]]]
    clips = [urljoin(page.as_uri(), item["clip"]) for item in data["items"]]
    assert clips == [(EXAMPLE_CSV.parent / f"videos/example_0_{side}.mp4").as_uri() for side in "abab"]


def test_the_calibration_by_hand():
    # sigmoid: 0.5, 0.5, 0.5, 0.7311, 0.7685, 0 and 1; bins 5, 7, 0 and 9. The tie and the unscored are left out.
    curve = build_calibration([0.0, 0.0, 0.0, 1.0, 1.2, -800.0, 800.0, 0.1, None], [1, 1, -1, -1, 1, -1, 1, 0, 1])
    assert [(point["count"], point["y"]) for point in curve["points"]] == [(1, 0.0), (3, 2 / 3), (2, 0.5), (1, 1.0)]
    assert [point["x"] for point in curve["points"]] == pytest.approx([0.0, 0.5, (0.7310586 + 0.7685248) / 2, 1.0])
    # (3 x 0.1667 + 2 x 0.2498) / 7
    assert curve["note"].startswith("7 pairs with a preference, ties left out; expected calibration error 0.143")
