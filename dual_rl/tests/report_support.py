"""Benchmarks with made-up rewards and thoughts, and what a report's page embeds."""

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from scoring.bench_csv import Bench, BenchType, read_bench
from scoring.journal import Journal
from scoring.report import summarise
from scoring.types import ScoredVideo
from toy_world.tables import read_table, write_table
from training_support import EXAMPLE_CSV

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
DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def make_rows(rows: Sequence[Sequence[str]] = ROWS, **cells: str) -> list[dict[str, str]]:
    """With more `cells`, the same in each row."""
    return [dict(zip(COLUMNS, row, strict=True)) | cells for row in rows]


def make_bench(folder: Path, rows: Sequence[Mapping[str, str]], bench_type: BenchType = "videoalign") -> Bench:
    """A benchmark beside empty videos."""
    for video in {row[name] for row in rows for name in row if name.startswith(("path_", "video_path"))}:
        (folder / video).touch()
    write_table(folder / "bench.csv", rows)
    return read_bench(folder / "bench.csv", bench_type)


def write_example_bench(folder: Path) -> tuple[Bench, dict[str, tuple[float, str]]]:
    """112 pairs: for each prompt of the example all pairs of its eight clips; per item a reward and a thought."""
    rng, rows = random.Random(0), []
    problems = [row["problem"] for row in read_table(EXAMPLE_CSV)]
    shutil.copytree(EXAMPLE_CSV.parent / "videos", folder / "videos")
    clips = [f"videos/example_{number}_{side}.mp4" for number in range(4) for side in "ab"]
    for problem in problems:
        for a, b in combinations(clips, 2):
            labels = {name: rng.choice(("A", "A", "B", "same")) for name in ("TA", "Overall")}
            models = {"A_model": f"toy {a[-7:-4]}", "B_model": f"toy {b[-7:-4]}"}
            rows.append({"path_A": a, "path_B": b, **models, "problem": problem, **labels})
    rows[5]["Overall"] = ""
    write_table(folder / "bench.csv", rows)
    bench = read_bench(folder / "bench.csv", "videoalign")
    return bench, {name: (rng.gauss(0, 1), _write_thought(rng)) for name in bench.items}


def _write_thought(rng: random.Random) -> str:
    scores = {name: rng.choice((0, 1, 2)) for name in DIMENSIONS}
    lines = [f"{name.capitalize()}: as the prompt asks, score {score}." for name, score in scores.items()]
    answer = json.dumps({"dimensional_scores": scores, "overall_score": 3.5})
    return "\n".join([*lines, "<answer>", answer, "</answer>"])


def fill_journal(journal: Journal, scored: Mapping[str, tuple[float, str]]) -> None:
    """Add rewards and thoughts by item."""
    for name, (reward, thought) in scored.items():
        journal.add(ScoredVideo(name, reward, thought, len(thought) // 4, True))


def make_result(bench: Bench, journal: Journal) -> dict[str, object]:
    """What a run writes as JSON."""
    run = {"weights": "5f0c1a", "backend": "vllm", "video": {"fps": 2.0, "max_pixels": 401408}, "format_prompt": "{}"}
    summary = summarise(bench, journal, seed=0)
    return {"model_ckpt": "runs/toy/global_step_60", "data_path": bench.path, "run": run, **summary}


def read_data(page: str) -> dict:
    """What a page embeds."""
    return json.loads(DATA.search(page)[1])
