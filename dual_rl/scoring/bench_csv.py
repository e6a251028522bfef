"""Benchmark CSVs: the pairs (or single videos) that inference scores, in the columns that each benchmark came with.

Everything is read and checked before a model is loaded. Each distinct (video, problem) becomes one item, however many
rows name it; rows hold item ids. Cells are not kept: `iterate_rows` streams them again for the file of results.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from sys import intern
from typing import Literal

from descore.answers import parse_annotation, parse_label
from descore.csv_table import CsvError, CsvRow, CsvTable, is_path, row_of, shorten
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

    def find_missing(self, columns: Sequence[str]) -> list[str]:
        """What a file with these columns lacks, in words; empty if it has this format."""
        missing = [column for column in self.video_columns if column not in columns]
        if BARE_PROMPT_COLUMN not in columns and PROBLEM_COLUMN not in columns:
            missing.append(BARE_PROMPT_COLUMN)
        if self.label_columns and not self.find_labels(columns):
            missing.append(" or ".join(self.label_columns))
        return missing


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


class LabelReader:
    """Reads the labels of a file row by row, and finds out which columns hold labels.

    A column that matches only by `*`, such as GSB_MQ_A_reasoning, and holds text but no label is not a label column.
    Anywhere else a cell that is not a label is a fault.
    """

    def __init__(self, bench_format: BenchFormat, columns: Sequence[str]) -> None:
        self._format, self.names = bench_format, bench_format.find_labels(columns)
        self._faults: dict[str, list[str]] = {name: [] for name in self.names}
        self._has_labels = dict.fromkeys(self.names, False)

    def read(self, row: CsvRow) -> tuple[int | None, ...]:
        """A label per candidate column; None for `invalid`, a blank or a faulty cell."""
        return tuple(self._read_cell(row, name) for name in self.names)

    def _read_cell(self, row: CsvRow, name: str) -> int | None:
        text = row.cells[name].strip()
        if text.lower() in BLANK:
            return None
        try:
            label = self._format.parse(text)
        except ValueError as error:
            self._faults[name].append(f"{row.name}: {name}: {error}")
            return None
        self._has_labels[name] = True
        return label

    def find_columns(self) -> dict[str, int]:
        """After the last row: name of each label column -> its index in what `read` returns."""
        is_fixed = self._format.label_columns
        return {
            name: index
            for index, name in enumerate(self.names)
            if name in is_fixed or self._has_labels[name] or not self._faults[name]
        }

    def find_faults(self) -> list[str]:
        """After the last row: the cells of label columns that are not labels, with their rows."""
        return [fault for name in self.find_columns() or self.names for fault in self._faults[name]]


@dataclass(frozen=True, slots=True)
class BenchItem:
    """One distinct (video, problem), scored once: its `compute_item_id`, absolute path and user turn."""

    item_id: str
    video: str
    problem: str


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One row. `item_ids`: of A and B, or of the single video. `labels`: in the order of `Bench.label_columns`, each
    +1, -1, 0 or None as from `BenchFormat.parse`. `models`: who made A and B, None if the file does not say.

    With label columns VQ, Overall: BenchRow(("0f3a61c2d4e5b697", "b1c8800a72f35d4e"), (1, None), ("sora", "kling"))
    """

    item_ids: tuple[str, ...]
    labels: tuple[int | None, ...]
    models: tuple[str, str] | None


@dataclass(frozen=True)
class Bench:
    """A benchmark file. `rows` and `iterate_rows(path)` have the same order; `items` has that of first mention.

    `num_duplicate_rows`: rows with the items and labels of an earlier one; they stay in `rows`. `missing`: item_id ->
    "video not found: PATH" for items that cannot be scored.
    """

    path: str
    bench_type: BenchType
    label_columns: tuple[str, ...]
    items: dict[str, BenchItem]
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
    not a UTF-8 CSV with this format's columns, or that lists all faults of the rows (counted from 1, without header).
    """
    if video_root and not Path(video_root).is_dir():
        raise CsvError(path, [f"video_root {video_root} is not a folder. Give the one that video paths start from."])
    root = Path(video_root or Path(path).parent).resolve()
    table, form = CsvTable(path), BENCH_FORMATS[bench_type]
    _require_columns(path, table.columns, bench_type)
    reader, items, rows = LabelReader(form, table.columns), {}, []
    for row in table.rows():
        labels = reader.read(row)
        if faults := _find_faults(form, row.cells):
            table.problems += [f"{row.name}: {fault}" for fault in faults]
        else:
            item_ids = tuple(_add_item(items, root, row.cells, column) for column in form.video_columns)
            rows.append(BenchRow(item_ids, labels, _read_models(form, row.cells)))
    table.problems = sorted([*table.problems, *reader.find_faults()], key=row_of)
    kept = reader.find_columns()
    if len(kept) < len(reader.names):
        left_out = ", ".join(name for name in reader.names if name not in kept)
        logger.info("%s: no label in %s; these are not label columns", path, left_out)
        rows = [replace(row, labels=tuple(row.labels[index] for index in kept.values())) for row in rows]
    absent = {video for video in {item.video for item in items.values()} if not os.path.isfile(video)}
    missing = {item.item_id: f"video not found: {item.video}" for item in items.values() if item.video in absent}
    if items and len(missing) == len(items):
        table.problems.append(f"no video exists, {min(absent)} for one; paths start from {root}. Set video_root.")
    table.require_clean()
    num_duplicate_rows = len(rows) - len({(row.item_ids, row.labels) for row in rows})
    return Bench(str(path), bench_type, tuple(kept), items, rows, num_duplicate_rows, missing)


def read_columns(path: str | os.PathLike) -> tuple[str, ...]:
    """The names in the header line. Raises CsvError if there are none or one occurs twice."""
    return CsvTable(path).columns


def iterate_rows(path: str | os.PathLike) -> Iterator[CsvRow]:
    """Every row, unchanged and in the file's order. Raises CsvError at a row that cannot be read."""
    table = CsvTable(path)
    for row in table.rows():
        table.require_clean()
        yield row
    table.require_clean()


def _find_faults(form: BenchFormat, cells: dict[str, str]) -> list[str]:
    faults = [
        f"{name} is {shorten(cells[name])!r}; write the path of a video"
        for name in form.video_columns
        if not is_path(cells[name])
    ]
    if not cells.get(PROBLEM_COLUMN, "").strip() and not cells.get(BARE_PROMPT_COLUMN, "").strip():
        faults.append(f"{BARE_PROMPT_COLUMN} is empty; write the text that the video was made from")
    return faults


def _add_item(items: dict[str, BenchItem], root: Path, cells: dict[str, str], column: str) -> str:
    """Add the item of a row's video unless it is there; returns its id. Equal strings are held once."""
    problem, video = cells.get(PROBLEM_COLUMN, ""), cells[column].strip()
    if not problem.strip():
        problem = judge_problem(cells[BARE_PROMPT_COLUMN])
    item_id, path = compute_item_id(video, problem=problem), os.path.normpath(root / video)
    item = items.setdefault(item_id, BenchItem(item_id, intern(path), intern(problem)))
    assert (item.video, item.problem) == (path, problem), f"two items have the id {item_id}: {item.video}, {path}"
    return item.item_id


def _read_models(form: BenchFormat, cells: dict[str, str]) -> tuple[str, ...] | None:
    models = tuple(intern(cells.get(column, "").strip()) for column in form.model_columns)
    return None if not models or any(model.lower() in BLANK for model in models) else models


def _require_columns(path: str | os.PathLike, columns: Sequence[str], bench_type: BenchType) -> None:
    missing = BENCH_FORMATS[bench_type].find_missing(columns)
    if missing:
        fitting = [name for name, other in BENCH_FORMATS.items() if not other.find_missing(columns)]
        remedy = f"it looks like --bench_type {' or '.join(fitting)}" if fitting else "add them to its header line"
        has = ", ".join(columns)[:400]
        raise CsvError(path, [f"{bench_type} needs {', '.join(missing)}; the file has {has}: {remedy}"])
