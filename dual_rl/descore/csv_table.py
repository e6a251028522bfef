"""CSV files written by people: read strictly, with every fault named by file and row."""

import ast
import csv
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

NUM_PROBLEMS_SHOWN = 20
MAX_SHOWN_CHARACTERS = 80
MAX_LIST_CHARACTERS = 10_000
MAX_PATH_CHARACTERS = 4095
"""Of a path on Linux."""
RAGGED = "it has {} cells where the header line has {}; quote cells that hold commas or line breaks"
_NO_TEXT = re.compile(r"[\0\udc80-\udcff]")  # NUL, and what surrogateescape makes of bytes that are not UTF-8

Parsed = TypeVar("Parsed")


class CsvError(ValueError):
    """Faults of a CSV, with file, rows and remedies. `problems` holds one line per fault."""

    def __init__(self, path: str | os.PathLike, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{path}: {len(problems)} fault(s)\n{list_problems(problems)}")


def list_problems(problems: Sequence[str]) -> str:
    """One indented line per problem, the first `NUM_PROBLEMS_SHOWN` of them."""
    lines = [f"  {problem}" for problem in problems[:NUM_PROBLEMS_SHOWN]]
    more = len(problems) - len(lines)
    return "\n".join([*lines, f"  ... and {more} more"] if more else lines)


@dataclass(frozen=True)
class CsvRow:
    """One row of data. `number` counts rows of data from 1, `line` is where it begins in the file."""

    number: int
    line: int
    cells: dict[str, str]

    @property
    def name(self) -> str:
        return f"row {self.number} (line {self.line})"


class CsvTable:
    """A UTF-8 CSV with a header line. Raises CsvError when the file cannot be used as one.

    `columns`: the names in the header line. `problems`: faults of the rows read so far.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        self.problems: list[str] = []
        if not Path(path).is_file():
            raise CsvError(path, ["file not found; give the path of a CSV"])
        self.columns = next((tuple(cells) for _, cells in self._read()), ())
        if not self.columns:
            raise CsvError(path, ["the file is empty; begin with a line that names the columns"])
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            names = shorten(", ".join(twice))
            raise CsvError(path, [f"column(s) {names} appear twice in the header line; rename or remove one"])

    def require(self, columns: Iterable[str], *, remedy: str = "add it, or rename another") -> None:
        """Raise CsvError unless all of these columns are there."""
        has = shorten(", ".join(self.columns), 400)
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise CsvError(self.path, [f"column {name} is missing; {remedy}; the file has {has}" for name in missing])

    def rows(self) -> Iterator[CsvRow]:
        """Rows as wide as the header line; others are added to `problems`. Blank lines are skipped."""
        number = 0
        for line, cells in itertools.islice(self._read(), 1, None):
            number += 1
            row = CsvRow(number, line, dict(zip(self.columns, cells, strict=False)))
            if len(cells) == len(self.columns):
                yield row
            else:
                self.problems.append(f"{row.name}: {RAGGED.format(len(cells), len(self.columns))}")
        if not number:
            self.problems.append("there are no rows; add at least one")

    def parse(self, parse_row: Callable[[CsvRow], Parsed]) -> Iterator[Parsed]:
        """What `parse_row` makes of each row; the messages of its ValueErrors go to `problems`."""
        for row in self.rows():
            try:
                parsed = parse_row(row)
            except ValueError as error:
                self.problems.append(f"{row.name}: {error}")
            else:
                yield parsed

    def require_clean(self) -> None:
        """Raise CsvError that lists `problems` if there are any."""
        if self.problems:
            raise CsvError(self.path, self.problems)

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        """First line and cells of each record that is not blank."""
        with open(self.path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(self._text_lines(file), strict=True)
            line = 1
            try:
                for cells in reader:
                    if cells:
                        yield line, cells
                    line = reader.line_num + 1
            except csv.Error as error:
                message = f"line {line}: the CSV cannot be read from here on: {error}; check its quotes"
                raise CsvError(self.path, [message]) from error

    def _text_lines(self, lines: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if bad := _NO_TEXT.search(line):
                byte = ord(bad[0]) & 0xFF
                raise CsvError(self.path, [f"line {number}: byte {byte:#04x} is not UTF-8 text; save it as UTF-8"])
            yield line


def row_of(problem: str) -> int:
    """The row that a fault names, 0 for the whole file; the key for sorting faults."""
    match = re.match(r"row (\d+)", problem)
    return int(match[1]) if match else 0


def shorten(text: str, length: int = MAX_SHOWN_CHARACTERS) -> str:
    """A cell as it is shown in messages."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def is_path(value: object) -> bool:
    """Whether a value can be the path of a file."""
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value and len(value) <= MAX_PATH_CHARACTERS


def parse_two_paths(text: str, column: str) -> tuple[str, str]:
    """Two paths from a list literal such as ['a.mp4', 'b.mp4']. Raises ValueError."""
    paths = _parse_two(text)
    if paths is None or not all(is_path(path) for path in paths):
        example = "such as ['a.mp4', 'b.mp4'], video A first"
        raise ValueError(f"{column} is {shorten(text)!r}; write a list of two paths, {example}")
    return paths


def parse_two_seconds(text: str, column: str) -> tuple[float, float]:
    """Two durations from a list literal such as [2.0, 2.5]. Raises ValueError."""
    try:
        seconds = tuple(float(value) for value in _parse_two(text) or ())
    except (TypeError, ValueError, OverflowError):
        seconds = ()
    if not seconds or not all(0 <= value < math.inf for value in seconds):
        example = "such as [2.0, 2.5], or leave it empty"
        raise ValueError(f"{column} is {shorten(text)!r}; write two durations in seconds, {example}")
    return seconds


def _parse_two(text: str) -> tuple | None:
    """The items of a list literal of two; None for anything else."""
    try:
        value = ast.literal_eval(text.strip()) if len(text) <= MAX_LIST_CHARACTERS else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that it documents
        return None
    return tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else None
