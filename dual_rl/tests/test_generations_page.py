"""The page of what training generated: thoughts by step, beside the annotation, with clips where the CSV is given."""

import json
from pathlib import Path
from urllib.parse import urljoin

import pytest

from report_support import read_data, write_example_bench
from scoring.html_report import main, write_generations_report
from training_support import EXAMPLE_CSV
from verl.data.pair_csv import CsvError


def write_generations(path: Path, *, problem: str = "Judge <video>", steps=(0, 20)) -> Path:
    thought = '<answer>{"dimensional_scores": {"style": 1}}</answer>'
    answer = '<answer>{"video_1_scores": {"style": 2}, "video_2_scores": {"style": 0}}</answer>'
    rows = [
        {"step": step, "pair_id": 0, "side": side, "sample": 0, "reward/overall": reward, "reward/sub": 0.5}
        | {"prompt": problem, "response": thought if side == "A" else "hm", "head_reward": None, "answer": answer}
        for step in steps
        for side, reward in (("A", 0.5), ("B", None))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "torn', encoding="utf-8")
    return path


def test_generations_of_training_are_shown_by_step_beside_the_annotation(tmp_path):
    source = write_generations(tmp_path / "generations.jsonl")
    write_generations_report(tmp_path / "out.html", source)
    data = read_data((tmp_path / "out.html").read_text())
    assert [row["numbers"] for row in data["rows"]] == [
        [0, 0.5, None],
        [0, None, None],
        [20, 0.5, None],
        [20, None, None],
    ]
    assert data["views"][0]["verdicts"] == ["well-formed", "malformed"] * 2
    assert [row["scores"] for row in data["rows"][:2]] == [[["style", "1", "2"]], [["style", "-", "0"]]]
    assert data["rows"][0]["score_columns"] == ["model", "annotators"]
    assert data["rows"][0]["summary"] == "step 0, sample 0, overall 0.5, sub 0.5"
    assert [row["facets"] for row in data["rows"][1:3]] == [[["0"], ["B"]], [["20"], ["A"]]]
    assert [item["clip"] for item in data["items"]] == [None] * 4
    points = data["views"][0]["charts"][1]["points"]
    assert [(point["x"], point["y"], point["count"]) for point in points] == [(0, 0.5, 1), (20, 0.5, 1)]


def test_generations_show_the_clips_of_the_csv_that_they_were_made_from(tmp_path, capsys):
    bench, _ = write_example_bench(tmp_path / "bench")
    problem = next(iter(bench.items.values())).problem
    source, page = write_generations(tmp_path / "generations.jsonl", problem=problem), tmp_path / "out.html"
    assert main([str(source), "--output", str(page), "--data", str(EXAMPLE_CSV)]) == 0
    clips = [urljoin(page.as_uri(), item["clip"]) for item in read_data(page.read_text())["items"]]
    assert clips == [(EXAMPLE_CSV.parent / f"videos/example_0_{side}.mp4").as_uri() for side in "abab"]
    write_generations(source, problem="another")
    with pytest.raises(CsvError, match=r"row 1 is not what generations were made for: give the run's data\.val_files"):
        write_generations_report(page, source, data=EXAMPLE_CSV)
    assert main([str(tmp_path / "absent"), "--output", str(page)]) == 1
    assert capsys.readouterr().err.startswith(f"error: no {tmp_path / 'absent'}: give the generations.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no generations yet: stage 2 logs them when it validates"),
        ('{"step": 1}\n', "line 1: no generation of stage 2, which has step, pair_id"),
        ("[1]\n", "line 1: no generation"),
        ("step 1\n", "line 1: no JSON"),
    ],
)
def test_what_is_no_file_of_generations_is_named(tmp_path, content, message):
    (tmp_path / "generations.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_generations_report(tmp_path / "out.html", tmp_path / "generations.jsonl")
    assert not (tmp_path / "out.html").exists()
