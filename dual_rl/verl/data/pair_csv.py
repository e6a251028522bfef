"""The stage 2 CSV: videos, problem, answer. Read and checked before a model is loaded; data/README.md describes it."""

import os
from pathlib import Path

from descore.answers import parse_annotation
from descore.csv_table import CsvError, CsvRow, CsvTable, parse_two_paths
from verl.config import DataConfig
from verl.data.scored_sequence import judge_problem
from verl.types import PreferencePair

BARE_PROMPT_COLUMN = "prompt"  # a file with it and without the problem column gets the built-in judge prompt


def read_pairs(path: str | os.PathLike, data: DataConfig) -> list[PreferencePair]:
    """The pairs of a CSV, in its order; `pair_id` counts rows from 0.

    Columns are named by `data.video_key`, `prompt_key` and `answer_key`; relative video paths start from
    `data.image_dir`, by default the CSV's folder. A row without problem gets the built-in judge prompt around its
    `prompt`. Raises CsvError with every fault: a file that cannot be read, missing columns, cells that do not parse.
    """
    folder = Path(data.image_dir) if data.image_dir else Path(path).resolve().parent
    if not folder.is_dir():
        raise CsvError(path, [f"data.image_dir {folder} is not a folder; name the one that video paths start from"])
    table = CsvTable(path)
    columns = [data.video_key, data.answer_key]
    if BARE_PROMPT_COLUMN not in table.columns:
        columns.append(data.prompt_key)
    table.require(columns, remedy="name yours with data.video_key, data.prompt_key or data.answer_key")
    pairs = list(table.parse(lambda row: _parse_row(row, folder.absolute(), data)))
    table.require_clean()
    return pairs


def _parse_row(row: CsvRow, folder: Path, data: DataConfig) -> PreferencePair:
    problem = row.cells.get(data.prompt_key, "")
    if not problem.strip():
        prompt = row.cells.get(BARE_PROMPT_COLUMN, "")
        if not prompt.strip():
            raise ValueError(f"{data.prompt_key} is empty; write the instruction of the judge")
        problem = judge_problem(prompt)
    answer = row.cells[data.answer_key]
    try:
        preference = parse_annotation(answer).preference
    except ValueError as error:
        raise ValueError(f"{data.answer_key}: {error}") from error
    video_a, video_b = parse_two_paths(row.cells[data.video_key], data.video_key)
    return PreferencePair(
        pair_id=row.number - 1,
        videos=(os.path.normpath(folder / video_a), os.path.normpath(folder / video_b)),
        problem=problem,
        answer=answer,
        preference=preference,
    )
