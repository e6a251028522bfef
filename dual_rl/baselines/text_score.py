"""Accuracies of the scores that a model writes in its text, from a scored benchmark: how good a generative judge is.

    python baselines/text_score.py OUTPUT.csv --bench_type tabench

OUTPUT.csv is what inference.py writes; of it `CoT_A` and `CoT_B` are read, not the rewards. The score is the answer's
`overall_score`. Such scores are often equal, which is wrong where people have a preference, the same rule as for
rewards. A pair with a text without a readable score counts as equal.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from descore.answers import extract_overall
from descore.csv_table import CsvTable
from scoring.accuracy import compute_pair_accuracy
from scoring.bench_csv import BENCH_FORMATS

COT_COLUMNS = ("CoT_A", "CoT_B")


def compute_text_margin(cot_a: str, cot_b: str) -> float:
    """The score in text A minus that in text B; 0 when one cannot be read."""
    score_a, score_b = extract_overall(cot_a), extract_overall(cot_b)
    return 0.0 if score_a is None or score_b is None else score_a - score_b


def read_text_margins(path: str, bench_type: str) -> dict[str, list[tuple[float, int]]]:
    """Label column -> (margin, label) of each pair that was scored and has a label.

    Raises CsvError, a ValueError, for a file without the columns that are needed.
    """
    form, table = BENCH_FORMATS[bench_type], CsvTable(path)
    needed = [*COT_COLUMNS, *(() if form.find_labels(table.columns) else form.label_columns)]
    table.require(needed, remedy="name a benchmark of pairs as inference.py wrote it")
    rows = [row for row in table.rows() if row.cells["Reward_A"] and row.cells["Reward_B"]]
    labels_by_column, faults = form.read_labels(table.columns, rows)
    table.problems += faults
    table.require_clean()
    margins = [compute_text_margin(*(row.cells[column] for column in COT_COLUMNS)) for row in rows]
    return {
        name: [(margin, label) for margin, label in zip(margins, labels, strict=True) if label is not None]
        for name, labels in labels_by_column.items()
    }


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns 1 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="CSV that inference.py wrote")
    paired = [name for name, form in BENCH_FORMATS.items() if form.label_columns]
    parser.add_argument("--bench_type", required=True, choices=paired)
    options = parser.parse_args(argv)
    try:
        by_label = read_text_margins(options.output, options.bench_type)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    titles = ("score in the text", "accuracy without ties", "with ties, calibrated", "pairs")
    sys.stdout.write("{:<30}{:>24}{:>24}{:>14}\n".format(*titles))
    for name, pairs in by_label.items():
        result = compute_pair_accuracy([margin for margin, _ in pairs], [label for _, label in pairs])
        cells = "".join(f"{estimate or '-'!s:>24}" for estimate in (result.without_ties, result.with_ties))
        sys.stdout.write(f"{name:<30}{cells}{f'{result.num_decided} + {result.num_ties}':>14}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
