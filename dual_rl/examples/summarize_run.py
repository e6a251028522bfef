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


def read_log(run: Path) -> Log:
    """Lines of the log, or of train_log.jsonl in a run's folder. Raises ValueError when there is none."""
    path = run if run.is_file() else run / "train_log.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}: is {run} the folder of a run with the `file` logger?")
    return [json.loads(line) for line in path.read_text().splitlines()]


def average(lines: Log) -> dict[str, float]:
    """Means of the numbers that all lines have."""
    shared = set.intersection(*map(set, lines))
    values = {name: [line[name] for line in lines] for name in shared}
    return {name: statistics.fmean(v) for name, v in values.items() if isinstance(v[0], int | float)}


def average_logs(logs: Sequence[Log]) -> Log:
    """Means over the logs of the steps that all of them have."""
    by_step = [{line["step"]: line for line in log} for log in logs]
    return [average([lines[step] for lines in by_step]) for step in sorted(set.intersection(*map(set, by_step)))]


def format_table(title: str, rows: dict[str, str], columns: Log) -> list[str]:
    """One line per metric, one column per entry of `columns`, headed by its step."""
    lines = [f"{title:30s}" + "".join(f"{column['step']:9.0f}" for column in columns)]
    for label, name in rows.items():
        cells = [f"{column[name]:9.3f}" if name in column else f"{'-':>9}" for column in columns]
        lines.append(f"{label:30s}" + "".join(cells))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="save_checkpoint_path of each run, or its log")
    try:
        log = average_logs([read_log(run) for run in parser.parse_args().runs])
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    validated = [line for line in log if VALIDATION["rule reward"] in line]
    steps = [line for line in log if TRAINING["rule reward"] in line]
    size = max(1, -(-len(steps) // QUARTERS))
    quarters = [steps[start : start + size] for start in range(0, len(steps), size)]
    means = [{**average(quarter), "step": quarter[-1]["step"]} for quarter in quarters]
    lines = format_table("on held-out pairs, step", VALIDATION, validated)
    lines += ["", *format_table("in training, up to step", TRAINING, means)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
