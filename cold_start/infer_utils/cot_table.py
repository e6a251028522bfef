"""A CSV whose cells come out as they went in, whatever its columns are called, and files that are whole or absent."""

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preference_csv import CsvError


@dataclass(frozen=True)
class CsvTable:
    """Header and rows of a CSV, every cell as its text; each row has a cell for every column."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def cells(self, row: int) -> dict[str, str]:
        """Column -> text of a row, which is counted from 1."""
        return dict(zip(self.header, self.rows[row - 1], strict=True))


def read_table(path: str | os.PathLike) -> CsvTable:
    """Read a UTF-8 CSV, which `preference_csv.read_pairs` has found readable; blank lines are passed over as there.

    Raises CsvError for rows with more or fewer cells than the header.
    """
    csv.field_size_limit(sys.maxsize)
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = [tuple(cells) for cells in csv.reader(file) if cells]
    problems = [
        f"row {number}: {len(cells)} cells under {len(header)} columns; quote cells that contain commas"
        for number, cells in enumerate(rows, start=1)
        if len(cells) != len(header)
    ]
    if problems:
        raise CsvError(path, problems)
    return CsvTable(header, tuple(rows))


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV under a temporary name and rename it."""
    # The csv module leaves a lone carriage return unquoted, which others read as the end of a line.
    has_return = any("\r" in cell for cells in rows for cell in cells)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL)
        writer.writerows([header, *rows])
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
