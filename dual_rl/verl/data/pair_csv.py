"""The stage 2 CSV: videos, problem, answer. Read and checked before a model is loaded; data/README.md describes it."""

import ast
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from verl.config import DataConfig
from verl.data.answers import parse_annotation
from verl.data.scored_sequence import judge_problem
from verl.types import PreferencePair

BARE_PROMPT_COLUMN = "prompt"  # a file with it and without the problem column gets the built-in judge prompt
NUM_PROBLEMS_SHOWN = 10


class CsvError(ValueError):
    """Faults of a CSV, with file, rows and remedies. `problems` holds one line per fault; the message shows ten."""

    def __init__(self, path: str | os.PathLike, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = len(problems) - NUM_PROBLEMS_SHOWN
        lines = [f"{path}: {len(problems)} fault(s)", *(f"  {line}" for line in problems[:NUM_PROBLEMS_SHOWN])]
        super().__init__("\n".join(lines + ([f"  ... and {more} more"] if more > 0 else [])))


def read_pairs(path: str | os.PathLike, data: DataConfig) -> list[PreferencePair]:
    """The pairs of a CSV, in its order; `pair_id` counts rows from 0.

    Columns are named by `data.video_key`, `prompt_key` and `answer_key`; relative video paths start from
    `data.image_dir`, by default the CSV's folder. A row without problem gets the built-in judge prompt around its
    `prompt`. Raises CsvError with every fault: a file that cannot be read, missing columns, cells that do not parse,
    videos that do not exist. Rows and lines count from 1.
    """
    folder = Path(data.image_dir) if data.image_dir else Path(path).resolve().parent
    if not folder.is_dir():
        raise CsvError(path, [f"data.image_dir {folder} is no folder; give the one that video paths start from"])
    pairs: list[PreferencePair] = []
    problems: list[str] = []
    for index, (line, cells) in enumerate(_read_rows(path, data)):
        try:
            pairs.append(_parse_row(index, cells, folder.absolute(), data))
        except ValueError as error:
            problems.append(f"row {index + 1} (line {line}): {error}")
    if problems:
        raise CsvError(path, problems)
    if not pairs:
        raise CsvError(path, ["no rows; add at least one pair"])
    return pairs


def _read_rows(path: str | os.PathLike, data: DataConfig) -> Iterator[tuple[int, dict[str, str]]]:
    """First line and cells of every row. Raises CsvError when the file cannot be used at all."""
    if not Path(path).is_file():
        raise CsvError(path, ["file not found; give the path of a CSV"])
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _require_columns(path, reader.fieldnames or (), data)
            line = reader.line_num + 1
            for cells in reader:
                yield line, cells
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise CsvError(path, [f"not a readable UTF-8 CSV: {error}; save it again as UTF-8 CSV"]) from error


def _require_columns(path: str | os.PathLike, columns: Sequence[str], data: DataConfig) -> None:
    settings = {"data.video_key": data.video_key, "data.answer_key": data.answer_key}
    if BARE_PROMPT_COLUMN not in columns:
        settings["data.prompt_key"] = data.prompt_key
    missing = {setting: name for setting, name in settings.items() if name not in columns}
    if missing:
        has = ", ".join(columns) or "no header line"
        raise CsvError(
            path, [f"missing column {name}; the file has {has}: set {key}" for key, name in missing.items()]
        )


def _parse_row(pair_id: int, cells: dict[str, str], folder: Path, data: DataConfig) -> PreferencePair:
    if None in cells or None in cells.values():
        raise ValueError("not as many cells as the header line has; quote cells that hold commas or line breaks")
    problem = cells.get(data.prompt_key, "")
    if not problem.strip():
        prompt = cells.get(BARE_PROMPT_COLUMN, "")
        if not prompt.strip():
            raise ValueError(f"{data.prompt_key} is empty; write the instruction of the judge")
        problem = judge_problem(prompt)
    answer = cells[data.answer_key]
    try:
        preference = parse_annotation(answer).preference
    except ValueError as error:
        raise ValueError(f"{data.answer_key}: {error}") from error
    return PreferencePair(
        pair_id=pair_id,
        videos=_parse_videos(cells[data.video_key], folder, data.video_key),
        problem=problem,
        answer=answer,
        preference=preference,
    )


def _parse_videos(text: str, folder: Path, column: str) -> tuple[str, str]:
    """Absolute paths of A and B from a list literal. Raises ValueError when it is none or a file is missing."""
    try:
        videos = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{column} is {text!r}; write a list of two paths, such as ['a.mp4', 'b.mp4']") from error
    if not isinstance(videos, list | tuple) or len(videos) != 2 or not all(isinstance(v, str) for v in videos):
        raise ValueError(f"{column} is {text!r}; it must list two paths, video A first")
    paths = tuple(os.path.normpath(folder / video) for video in videos)
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"video not found: {path}; paths start from {folder}, see data.image_dir")
    return paths
