"""Writes the first rows of a CSV to another: `python take_rows.py train.csv train_10.csv 60`. Cells may hold lines."""

import csv
import os
import sys
from itertools import islice


def take_rows(source: str, target: str, count: int) -> None:
    """Copy the header line and `count` rows; raises ValueError when there are fewer."""
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(islice(csv.reader(file), count + 1))
    if len(rows) <= count:
        raise ValueError(f"{source} has {len(rows) - 1} rows, not {count}")
    with open(f"{target}.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(f"{target}.tmp", target)


if __name__ == "__main__":
    take_rows(sys.argv[1], sys.argv[2], int(sys.argv[3]))
