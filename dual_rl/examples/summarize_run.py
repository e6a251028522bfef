"""What a run of stage 2 changed on held-out pairs, from its log: `python summarize_run.py RUN_FOLDER`.

Several runs, say with other seeds, are averaged. A log can be named instead of its folder.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

VALIDATION = {
    "rule reward": "val/reward/overall/mean",
    "sub-scores right": "val/reward/sub/mean",
    "well-formed answers": "val/reward/format/mean",
    "pair accuracy of the head": "val/gsb_acc",
    "Bradley-Terry loss": "val/bt_loss",
    "tokens of a thought": "val/response_length/mean",
}
TRAINING = {
    "Bradley-Terry loss": "bt/loss",
    "rule reward": "reward/overall/mean",
    "seconds a step": "timing/seconds/step",
}
QUARTERS = 4

Log = Sequence[dict[str, float]]


def average(lines: Log) -> dict[str, float]:
    """Means of the numbers that all lines have."""
    shared = set.intersection(*map(set, lines))
    values = {name: [line[name] for line in lines] for name in shared}
    return {name: statistics.fmean(v) for name, v in values.items() if isinstance(v[0], int | float)}


def read_logs(runs: Sequence[Path]) -> Log:
    """Means over the runs of the steps that all of them have; of each run its folder or its log."""
    by_step = []
    for run in runs:
        log = run if run.is_file() else run / "train_log.jsonl"
        if not log.is_file():
            sys.exit(f"{log} does not exist. Give the folder of a run that has logged a step.")
        text = log.read_text()
        by_step.append({line["step"]: line for line in map(json.loads, text.splitlines())})
    return [average([lines[step] for lines in by_step]) for step in sorted(set.intersection(*map(set, by_step)))]


def format_table(title: str, rows: dict[str, str], columns: Log) -> list[str]:
    """One line per metric, one column per entry of `columns`, headed by its step."""
    lines = [f"{title:30s}" + "".join(f"{column['step']:9.0f}" for column in columns)]
    for label, name in rows.items():
        cells = [f"{column[name]:9.3f}" if name in column else f"{'-':>9}" for column in columns]
        lines.append(f"{label:30s}" + "".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="save_checkpoint_path of each run, or its log")
    log = read_logs(parser.parse_args().runs)
    validated = [line for line in log if VALIDATION["rule reward"] in line]
    steps = [line for line in log if TRAINING["rule reward"] in line]
    size = max(1, -(-len(steps) // QUARTERS))
    quarters = [steps[start : start + size] for start in range(0, len(steps), size)]
    means = [{**average(quarter), "step": quarter[-1]["step"]} for quarter in quarters]
    lines = format_table("on held-out pairs, step", VALIDATION, validated)
    lines += ["", *format_table("in training, up to step", TRAINING, means)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
