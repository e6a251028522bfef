"""Benchmarks with made-up rewards and thoughts, and what a report's page embeds."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from scoring.bench_csv import Bench, BenchType, read_bench
from toy_world.tables import write_table

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
