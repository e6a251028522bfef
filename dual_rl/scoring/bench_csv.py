"""Benchmark CSVs: the pairs (or single videos) that inference scores, in the columns that each benchmark came with.

Everything is read and checked before a model is loaded. Each distinct (video, problem) becomes one item, however many
rows name it; rows hold item ids.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from sys import intern
from typing import Literal

from descore.answers import parse_annotation, parse_label
from descore.csv_table import CsvError, CsvRow, CsvTable, is_path, row_of, shorten
from scoring.types import VideoTask
from verl.data.pair_csv import BARE_PROMPT_COLUMN
from verl.data.scored_sequence import judge_problem

BenchType = Literal["tabench", "videoalign", "genai", "react", "videofeedback"]
PROBLEM_COLUMN = "problem"
"""Where a row has it, it replaces the judge prompt around `prompt`."""
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"}
BLANK = ("", "nan")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchFormat:
    """The columns of a format. All have `prompt` or `problem`; other columns, such as fps_A, are not read.

    `video_columns`: A and B, or the one of single videos. `model_columns`: who made A and B, optional.
    `label_columns`: names, where `*` matches any text; a file needs at least one. `parse`: text of a label -> +1 if A
    is better, -1 if B is, 0 for a tie, None for `invalid`; raises ValueError for anything else.
    """

    video_columns: tuple[str, ...]
    model_columns: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    parse: Callable[[str], int | None] = parse_label

    def find_labels(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Those of `columns` that have the name of a label column, in their order."""
        return tuple(name for name in columns if any(fnmatchcase(name, label) for label in self.label_columns))

    def read_labels(self, columns: Sequence[str], rows: Sequence[CsvRow]) -> tuple[dict[str, list], list[str]]:
        """Label column -> label of each row, None for `invalid`, a blank or a faulty cell; and the faults of all.

        A column that matches only by `*`, such as GSB_MQ_A_reasoning, and holds text but no label is not a label
        column, unless there is no other.
        """
        labels, faults, faults_of_texts = {}, [], []
        for name in self.find_labels(columns):
            column, wrong, num_blank = [], [], 0
            for row in rows:
                text = row.cells[name].strip()
                is_blank = text.lower() in BLANK
                num_blank += is_blank
                try:
                    column.append(None if is_blank else self.parse(text))
                except ValueError as error:
                    column.append(None)
                    wrong.append(f"{row.name}: {name}: {error}")
            if name not in self.label_columns and wrong and len(wrong) + num_blank == len(rows):
                logger.info("no label in %s; it is not a label column", name)
                faults_of_texts += wrong
            else:
                labels[name] = column
                faults += wrong
        return labels, faults if labels else faults_of_texts


BENCH_FORMATS: dict[BenchType, BenchFormat] = {
    "tabench": BenchFormat(("video_A", "video_B"), (), ("answer",), lambda text: parse_annotation(text).preference),
    "videoalign": BenchFormat(("path_A", "path_B"), ("A_model", "B_model"), ("VQ", "MQ", "TA", "Overall")),
    "genai": BenchFormat(
        ("left_video_path", "right_video_path"),
        ("left_model", "right_model"),
        ("vote_type",),
        lambda text: parse_label(VOTES.get(text.lower(), text)),
    ),
    "react": BenchFormat(("path_A", "path_B"), ("A_model", "B_model"), ("GSB_*",)),
    "videofeedback": BenchFormat(("video_path",)),  # not video_fps: clips are sampled by the checkpoint's own budget
}


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One row and its `cells`. `item_ids`: of A and B, or of the single video. `labels`: in the order of
    `Bench.label_columns`, as from `BenchFormat.parse`. `models`: who made A and B, None if the file does not say.

    With labels VQ, Overall: BenchRow(("0f3a61c2d4e5b697", "b1c8800a72f35d4e"), (1, None), ("sora", "kling"), {})
    """

    item_ids: tuple[str, ...]
    labels: tuple[int | None, ...]
    models: tuple[str, ...] | None
    cells: dict[str, str]

    def compute_margin(self, rewards: Mapping[str, float]) -> float | None:
        """Reward of A minus reward of B; None for a single video, or without both rewards."""
        if len(self.item_ids) != 2 or not all(name in rewards for name in self.item_ids):
            return None
        return rewards[self.item_ids[0]] - rewards[self.item_ids[1]]


@dataclass(frozen=True)
class Bench:
    """A benchmark file. `columns`: all names in its header line. `rows` are in its order. `items`: each distinct video
    and problem by `compute_item_id`, in the order of first mention.

    `num_duplicate_rows`: rows with the items and labels of an earlier one; they stay in `rows`. `missing`: item_id ->
    "video not found: PATH" for items that cannot be scored.
    """

    path: str
    bench_type: BenchType
    columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    items: dict[str, VideoTask]
    rows: list[BenchRow]
    num_duplicate_rows: int
    missing: dict[str, str]

    @property
    def is_paired(self) -> bool:
        """Whether rows compare two videos; a benchmark of single videos has no labels either."""
        return len(BENCH_FORMATS[self.bench_type].video_columns) == 2


def compute_item_id(video: str, *, problem: str) -> str:
    """16 hex digits of the path in the CSV ("./a.mp4" is "a.mp4") and the problem. They last when the data move."""
    return blake2b(f"{os.path.normpath(video)}\0{problem}".encode(), digest_size=8).hexdigest()


def read_bench(path: str | os.PathLike, bench_type: BenchType, *, video_root: str | None = None) -> Bench:
    """Read and check a benchmark CSV.

    Relative video paths start from `video_root`, by default the CSV's folder. A label or model name that is empty or
    "nan" counts as none. Videos that do not exist are listed in `Bench.missing`. Raises CsvError for a file that is
    not a UTF-8 CSV with this format's columns, or that lists the faults of its rows (counted from 1, without header).
    """
    if video_root and not Path(video_root).is_dir():
        raise CsvError(path, [f"video_root {video_root} is not a folder. Give the one that video paths start from."])
    root = Path(video_root or Path(path).parent).resolve()
    table, form, items = CsvTable(path), BENCH_FORMATS[bench_type], {}
    needed = [*form.video_columns, *([] if PROBLEM_COLUMN in table.columns else [BARE_PROMPT_COLUMN])]
    if form.label_columns and not form.find_labels(table.columns):
        needed.append(" or ".join(form.label_columns))
    table.require(needed, remedy=f"--bench_type {bench_type} needs it")
    parsed = list(table.parse(lambda row: (row, _add_items(items, root, form, row.cells))))
    labels, faults = form.read_labels(table.columns, [row for row, _ in parsed])
    labels_by_row = zip(*labels.values(), strict=True) if labels else [()] * len(parsed)
    rows = [
        BenchRow(item_ids, of_row, _read_models(form, row.cells), row.cells)
        for (row, item_ids), of_row in zip(parsed, labels_by_row, strict=True)
    ]
    table.problems = sorted([*table.problems, *faults], key=row_of)
    absent = {video for video in {item.video for item in items.values()} if not os.path.isfile(video)}
    missing = {name: f"video not found: {item.video}" for name, item in items.items() if item.video in absent}
    if items and len(missing) == len(items):
        table.problems.append(f"no video exists, {min(absent)} for one; paths start from {root}. Set video_root.")
    table.require_clean()
    num_duplicate_rows = len(rows) - len({(row.item_ids, row.labels) for row in rows})
    return Bench(str(path), bench_type, table.columns, tuple(labels), items, rows, num_duplicate_rows, missing)


def _add_items(items: dict[str, VideoTask], root: Path, form: BenchFormat, cells: dict[str, str]) -> tuple[str, ...]:
    """Add the items of a row's videos unless they are there; returns their ids. Raises ValueError."""
    problem, prompt = cells.get(PROBLEM_COLUMN, ""), cells.get(BARE_PROMPT_COLUMN, "")
    for name in form.video_columns:
        if not is_path(cells[name]):
            raise ValueError(f"{name} is {shorten(cells[name])!r}; write the path of a video")
    if not problem.strip() and not prompt.strip():
        raise ValueError(f"{BARE_PROMPT_COLUMN} is empty; write the text that the video was made from")
    problem = intern(problem if problem.strip() else judge_problem(prompt))  # of all rows with this text one copy
    item_ids = []
    for video in (cells[name].strip() for name in form.video_columns):
        item_ids.append(compute_item_id(video, problem=problem))
        item = VideoTask(item_ids[-1], os.path.normpath(root / video), problem)
        known = items.setdefault(item.name, item)
        assert known == item, f"two items have the id {item.name}: {known.video}, {item.video}"
    return tuple(item_ids)


def _read_models(form: BenchFormat, cells: dict[str, str]) -> tuple[str, ...] | None:
    models = tuple(cells.get(column, "").strip() for column in form.model_columns)
    return None if not models or any(model.lower() in BLANK for model in models) else models
