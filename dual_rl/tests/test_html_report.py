"""The page of a run: it holds what was scored, finds its clips, and nothing in it runs, loads or breaks out."""

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from report_support import DATA, fill_journal, make_result, read_data
from scoring.bench_csv import Bench, read_bench
from scoring.html_report import write_report
from scoring.journal import Journal
from scoring.report import summarise
from scoring.report_charts import sigmoid
from scoring.scale import RewardScale
from scoring.scoring import FailedVideo, ScoredVideo
from toy_world.tables import write_table

HOSTILE = [
    "</script><script>alert(1)</script><!-- <script>",
    "<img src=http://127.0.0.1/x onerror=alert(1)> &lt; &amp; \\u003c",
    "line\r\nline\n\ttab\u2028\u2029\0 end",
    "caf\u00e9 \u6f22\u5b57 \U0001f600 half \ud83d",
    "@DATA@ @SCRIPT@ @POLICY@ {{x}} ${x} `",
    '<answer>{"dimensional_scores": {"<b>": NaN, "x": [1, "</script>"]}}</answer>',
]
REWARDS = {"a.mp4": 3.0, "b.mp4": 1.0, "c.mp4": 2.0, "d.mp4": 2.0}
ROWS = [  # A, B, their models, TA, Overall
    ("a.mp4", "b.mp4", "sora", "kling", "B", "A"),
    ("b.mp4", "c.mp4", "kling", "sora", "", "A"),
    ("c.mp4", "d.mp4", "sora", "wan", "A", "same"),
    ("a.mp4", "e.mp4", "sora", "kling", "", "A"),
]


class Tags(HTMLParser):
    """Which elements a page has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def make_bench(folder: Path, rows: Sequence[Sequence[str]] = ROWS) -> Bench:
    for video in {video for row in rows for video in row[:2]}:
        (folder / video).touch()
    names = ("path_A", "path_B", "A_model", "B_model", "TA", "Overall")
    write_table(folder / "bench.csv", [dict(zip(names, row, strict=True)) | {"prompt": "a red cat"} for row in rows])
    return read_bench(folder / "bench.csv", "videoalign")


def report(folder: Path, bench: Bench, rewards: Mapping[str, float] = REWARDS, thoughts=("",), scale=None) -> str:
    """The page of a run that gave these rewards and, in turn, these thoughts."""
    with Journal(folder / "out.rewards.jsonl", {}) as journal:
        for place, item in enumerate(bench.items.values()):
            name = os.path.basename(item.video)
            if name in rewards:
                thought = thoughts[place % len(thoughts)]
                journal.add(ScoredVideo(item.item_id, rewards[name], thought, 9, name != "b.mp4"))
            else:
                journal.add(FailedVideo(item.item_id, f"video is empty: {name}"))
        write_report(folder / "out.html", bench, journal, summarise(bench, journal, seed=0, scale=scale))
    return (folder / "out.html").read_text(encoding="utf-8")


def test_the_page_says_what_was_scored(tmp_path):
    data = read_data(report(tmp_path, make_bench(tmp_path)))
    assert data["views"][data["main"]]["name"] == "Overall"
    assert [view["verdicts"] for view in data["views"]] == [
        ["wrong", "unlabelled", "wrong", "unscored"],
        ["right", "wrong", "tie", "unscored"],
    ]
    assert [row["numbers"] for row in data["rows"]] == [
        [2.0, 2.0, 3.0, 1.0],
        [-1.0, 1.0, 1.0, 2.0],
        [0.0, 0.0, 2.0, 2.0],
        [None, None, 3.0, None],
    ]
    assert data["rows"][0]["summary"] == "margin +2.0000, P(A is better) 0.881"
    assert data["rows"][0]["facets"] == [["sora", "kling"]]
    assert [data["prompts"], data["failures"]] == [["a red cat"], ["video is empty: e.mp4"]]
    notes = {item["name"]: item["note"] for item in data["items"]}
    assert notes["e.mp4"] == "video is empty: e.mp4"
    assert notes["b.mp4"].startswith("cut at the length limit")
    assert notes["a.mp4"] == ""
    table = data["tables"][0]
    assert [row[0] for row in table["rows"]] == ["TA", "Overall"]
    assert table["rows"][1][5:] == ["2 + 1", "1"]
    assert data["views"][1]["tables"][0]["rows"][0][:2] == ["kling", "2"]


def test_rewards_are_on_the_scale_of_the_run_and_probabilities_are_not(tmp_path):
    scale = RewardScale(1.0, 2.0, 9, "val.csv", "w", {"fps": 2.0})
    data = read_data(report(tmp_path, make_bench(tmp_path), scale=scale))
    assert data["rows"][0]["numbers"] == [1.0, 1.0, 1.0, 0.0]
    assert data["rows"][0]["summary"] == "margin +1.0000, P(A is better) 0.881"
    assert dict(data["facts"])["rewards are in"].endswith("9 videos of val.csv, 1.0000 +- 2.0000")
    calibration = data["views"][1]["charts"][1]
    assert calibration["points"][-1]["x"] == sigmoid(2.0)


def test_hostile_text_comes_back_as_it_was_and_makes_no_element(tmp_path):
    bench = make_bench(tmp_path, [(f"{n}.mp4", f"{n + 1}.mp4", "<b>x</b>", "'\"", "A", "A") for n in range(6)])
    page = report(tmp_path, bench, {f"{n}.mp4": float(n) for n in range(7)}, HOSTILE)
    harmless = report(tmp_path, make_bench(tmp_path))
    data = read_data(page)
    assert [item["thought"] for item in data["items"][:6]] == HOSTILE
    assert data["rows"][0]["models"] == ["<b>x</b>", "'\""]
    assert data["rows"][5]["scores"][0][:2] == ["<b>", "nan"]
    assert Tags(page).found == Tags(harmless).found
    assert "<" not in DATA.search(page)[1]


def test_the_page_names_nothing_outside_and_its_policy_lets_only_its_own_script_run(tmp_path):
    page = report(tmp_path, make_bench(tmp_path))
    frame = DATA.sub("", page)
    assert re.search(r"https?:|//|@import|url\((?!#)", frame) is None
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', frame)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert (rules["default-src"], rules["media-src"]) == ("'none'", "'self' file:")
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", frame, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", frame)


def test_clips_are_found_from_another_folder_whatever_they_are_called(tmp_path):
    names = ["a b.mp4", "50%#1?.mp4", "c:d.mp4", "caf\u00e9.mp4"]
    (tmp_path / "data").mkdir()
    bench = make_bench(tmp_path / "data", [(names[0], names[1], "", "", "A", "A"), (*names[2:], "", "", "A", "A")])
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    with Journal(tmp_path / "out.rewards.jsonl", {}) as journal:
        result = summarise(bench, journal, seed=0)
        for folder, start in (("new/pages", "../../data/"), ("data", ""), ("link", "../../data/")):
            path = tmp_path / folder / "out.html"
            write_report(path, bench, journal, result)
            items = read_data(path.read_text())["items"]
            assert [item["name"] for item in items] == [start + name for name in names]
            for item, name in zip(items, names, strict=True):
                url = urljoin(path.resolve().as_uri(), item["clip"])
                assert unquote(urlsplit(url).path) == str(tmp_path / "data" / name)
        with pytest.raises(ValueError, match=r"the report is out\.txt; name a \.html file"):
            write_report("out.txt", bench, journal, result)


def test_single_videos_have_no_sides_and_no_labels(tmp_path):
    write_table(tmp_path / "bench.csv", [{"video_path": f"{name}.mp4", "prompt": "x"} for name in "abe"])
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    data = read_data(report(tmp_path, read_bench(tmp_path / "bench.csv", "videofeedback")))
    assert [row["numbers"] for row in data["rows"]] == [[3.0], [1.0], [None]]
    assert data["views"][0]["verdicts"] == ["unlabelled", "unlabelled", "unscored"]
    assert [chart["title"] for chart in data["views"][0]["charts"]] == ["Rewards"]
    assert data["items"][2]["clip"] is None
    assert (data["sides"], data["sorts"], data["tables"]) == ([""], ["reward"], [])


@pytest.mark.parametrize(
    ("thought", "scores"),
    [
        ("no JSON at all", []),
        ('<answer>{"overall_score": 2}</answer>', []),
        ('<answer>{"dimensional_scores": [1]}</answer>', []),
        ('<answer>{"dimensional_scores": null, "overall_score": 2}</answer>', [["overall", "2", "2"]]),
        (
            '<answer>```json\n{"dimensional_scores": {"a": 2, "b": "N/A"}}\n```</answer>',
            [["a", "2", "2"], ["b", "N/A", "N/A"]],
        ),
        (f'<answer>{{"dimensional_scores": {{"a": "{"x" * 999}"}}}}</answer>', [["a", "x" * 80, "x" * 80]]),
    ],
)
def test_thoughts_need_no_scores(tmp_path, thought, scores):
    data = read_data(report(tmp_path, make_bench(tmp_path), thoughts=(thought,)))
    assert data["rows"][0]["scores"] == scores
    assert data["rows"][0]["score_columns"] == (["A", "B"] if scores else [])


def test_a_thousand_pairs_are_light_and_quick(tmp_path):
    rng = random.Random(0)
    rows = [(f"{n}.mp4", f"{n + 1000}.mp4", "sora", "kling", "A", rng.choice(("A", "B", "same"))) for n in range(1000)]
    bench = make_bench(tmp_path, rows)
    thought = "it thinks " * 120 + '<answer>{"dimensional_scores": {"subject": 2, "style": 1}}</answer>'
    with Journal(tmp_path / "out.rewards.jsonl", {}) as journal:
        fill_journal(journal, {name: (rng.gauss(0, 1), thought) for name in bench.items})
        result = make_result(bench, journal)
        start = time.perf_counter()
        write_report(tmp_path / "out.html", bench, journal, result)
        seconds = time.perf_counter() - start
    assert (tmp_path / "out.html").stat().st_size < 4e6  # 2.5e6 of it are thoughts
    assert seconds < 3
