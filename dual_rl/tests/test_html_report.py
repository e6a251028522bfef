"""The page of a run, and of what training generated: it shows what was scored, finds its clips, and is inert."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from model_support import EXAMPLE_CSV
from report_support import DATA, REWARDS, ROWS, make_bench, make_rows, read_data
from scoring.bench_csv import Bench
from scoring.html_report import main, write_generations_report, write_report
from scoring.journal import Journal
from scoring.report import summarise
from scoring.report_charts import build_calibration, build_histogram, build_means, compute_wilson, sigmoid
from scoring.source import RewardScale
from scoring.types import FailedVideo, ScoredVideo
from toy_world.tables import read_table
from verl.data.pair_csv import CsvError

HOSTILE = [
    "</script><script>alert(1)</script><!-- <script>",
    "<img src=http://127.0.0.1/x onerror=alert(1)> &lt; &amp; \\u003c",
    "line\r\nline\n\ttab\u2028\u2029\0 end",
    "caf\u00e9 \U0001f600 half \ud83d",
    "{{ data }} {% raw %} ${x} `",
    '<answer>{"dimensional_scores": {"<b>": NaN, "x": [1, "</script>"]}}</answer>',
]
PAIRS = [*ROWS[:2], ("c.mp4", "d.mp4", "sora", "wan", "A", "same"), ROWS[3]]


class Tags(HTMLParser):
    """Which elements a page has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def bench_of(folder: Path, rows: Sequence[Sequence[str]] = PAIRS) -> Bench:
    return make_bench(folder, make_rows(rows, prompt="a red cat"))


def report(folder: Path, bench: Bench, rewards: Mapping[str, float] = REWARDS, thoughts=("",), scale=None) -> str:
    """The page of a run that gave these rewards and, in turn, these thoughts."""
    with Journal(folder / "out.rewards.jsonl", {}, overwrite=True) as journal:
        for index, item in enumerate(bench.items.values()):
            name = os.path.basename(item.video)
            if name in rewards:
                thought = thoughts[index % len(thoughts)]
                journal.add(ScoredVideo(item.item_id, rewards[name], thought, 9, name != "b.mp4"))
            else:
                journal.add(FailedVideo(item.item_id, f"video is empty: {name}"))
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

    scale = RewardScale(1.0, 2.0, 9, "val.csv", "w", {"fps": 2.0})  # of rewards, not of probabilities
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
    assert Tags(page).found == Tags(plain).found
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


def write_generations(path: Path, *, problem: str = "Judge <video>") -> Path:
    thought = '<answer>{"dimensional_scores": {"style": 1}}</answer>'
    answer = '<answer>{"video_1_scores": {"style": 2}, "video_2_scores": {"style": 0}}</answer>'
    rows = [
        {"step": step, "pair_id": 0, "side": side, "sample": 0, "reward/overall": reward, "reward/sub": 0.5}
        | {"prompt": problem, "response": thought if side == "A" else "hm", "head_reward": None, "answer": answer}
        for step in (0, 20)
        for side, reward in (("A", 0.5), ("B", None))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "torn', encoding="utf-8")
    return path


def test_generations_of_training_are_shown_by_step_beside_the_annotation(tmp_path):
    source = write_generations(tmp_path / "generations.jsonl")
    write_generations_report(tmp_path / "out.html", source)
    data = read_data((tmp_path / "out.html").read_text())
    numbers = [[0, 0.5, None], [0, None, None], [20, 0.5, None], [20, None, None]]
    assert [row["numbers"] for row in data["rows"]] == numbers
    assert data["views"][0]["verdicts"] == ["well-formed", "malformed"] * 2
    assert [item["scores"] for item in data["items"][:2]] == [
        {"model": {"style": "1"}, "annotators": {"style": "2"}},
        {"model": {}, "annotators": {"style": "0"}},
    ]
    assert data["rows"][0]["summary"] == "step 0, sample 0, overall 0.5, sub 0.5"
    assert [row["facets"] for row in data["rows"][1:3]] == [[["0"], ["B"]], [["20"], ["A"]]]
    assert [item["clip"] for item in data["items"]] == [None] * 4


def test_generations_show_the_clips_of_the_csv_that_they_were_made_from(tmp_path, capsys):
    problem = read_table(EXAMPLE_CSV)[0]["problem"]
    source, page = write_generations(tmp_path / "generations.jsonl", problem=problem), tmp_path / "out.html"
    assert main([str(source), "--output", str(page), "--data", str(EXAMPLE_CSV)]) == 0
    clips = [urljoin(page.as_uri(), item["clip"]) for item in read_data(page.read_text())["items"]]
    assert clips == [(EXAMPLE_CSV.parent / f"videos/example_0_{side}.mp4").as_uri() for side in "abab"]
    write_generations(source, problem="another")
    with pytest.raises(CsvError, match=r"row 1 is not what generations were made for: give the run's data\.val_files"):
        write_generations_report(page, source, data=EXAMPLE_CSV)
    source.write_text('{"step": 1}\n')
    assert main([str(source), "--output", str(page)]) == 1
    assert "line 1: not a generation of stage 2, which has step, pair_id" in capsys.readouterr().err


def test_the_charts_by_hand():
    verdicts = ["right", "wrong", "tie", "", "right", "right"]
    bars = build_histogram("t", "x", [-1.0, 0.0, 0.49, None, 9.0, -0.0001], verdicts)
    assert (bars["edges"][:3], bars["edges"][-1], len(bars["edges"])) == ([-1.0, -0.5, 0.0], 9.0, 21)
    filled = {name: [n for n, count in enumerate(counts) if count] for name, counts in bars["series"].items()}
    assert filled == {"right": [0, 1, 19], "tie": [2], "wrong": [2]}
    assert build_histogram("t", "x", [2.5, 2.5], ["a", "a"])["edges"] == [2.0, 3.0]
    assert build_histogram("t", "x", [None], ["a"]) is None
    # sigmoid: 0.5, 0.5, 0.5, 0.7311, 0.7685, 0 and 1; bins 5, 7, 0 and 9. The tie and the unscored are left out.
    curve = build_calibration([0.0, 0.0, 0.0, 1.0, 1.2, -800.0, 800.0, 0.1, None], [1, 1, -1, -1, 1, -1, 1, 0, 1])
    assert [(point["count"], point["y"]) for point in curve["points"]] == [(1, 0.0), (3, 2 / 3), (2, 0.5), (1, 1.0)]
    assert [point["x"] for point in curve["points"]] == pytest.approx([0.0, 0.5, (0.7310586 + 0.7685248) / 2, 1.0])
    # (3 x 0.1667 + 2 x 0.2498) / 7
    assert curve["note"].startswith("7 pairs with a preference, ties left out; expected calibration error 0.143")
    assert compute_wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert build_calibration([1.0], [0]) is None
    means = build_means("t", "y", [0, 20, 0, 20], [1.0, None, 3.0, 5.0])["points"]
    assert [(point["x"], point["y"], point["count"]) for point in means] == [(0, 2.0, 2), (20, 5.0, 1)]
