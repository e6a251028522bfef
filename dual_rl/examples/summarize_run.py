"""What a run of stage 2 changed on held-out pairs, from its log: `python summarize_run.py RUN_FOLDER`.

Several runs, with other seeds say, are averaged. A log can be named in place of its folder.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROWS = {
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


def read_log(run: Path) -> list[dict[str, float]]:
    """Lines of the log, or of train_log.jsonl in a run's folder. Raises ValueError when there is none."""
    path = run if run.is_file() else run / "train_log.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}: is {run} the folder of a run with the `file` logger?")
    return [json.loads(line) for line in path.read_text().splitlines()]


def average_logs(logs: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Means over the logs of the steps that all of them have, and of the numbers that all have there."""
    by_step = [{line["step"]: line for line in log} for log in logs]
    steps = sorted(set.intersection(*map(set, by_step)))
    return [
        {
            name: statistics.fmean(lines[step][name] for lines in by_step)
            for name, value in by_step[0][step].items()
            if isinstance(value, int | float) and all(name in lines[step] for lines in by_step)
        }
        for step in steps
    ]


def validation_table(log: list[dict[str, float]]) -> list[str]:
    """One line per metric, one column per validation."""
    validated = [line for line in log if ROWS["rule reward"] in line]
    lines = [f"{'on held-out pairs, step':30s}" + "".join(f"{line['step']:9.0f}" for line in validated)]
    for label, name in ROWS.items():
        values = [line.get(name) for line in validated]
        lines.append(f"{label:30s}" + "".join("        -" if v is None else f"{v:9.3f}" for v in values))
    return lines


def training_table(log: list[dict[str, float]]) -> list[str]:
    """Means over the quarters of the training."""
    steps = [line for line in log if TRAINING["rule reward"] in line]
    size = max(1, -(-len(steps) // QUARTERS))
    quarters = [steps[start : start + size] for start in range(0, len(steps), size)]
    lines = [f"{'in training, up to step':30s}" + "".join(f"{quarter[-1]['step']:9.0f}" for quarter in quarters)]
    for label, name in TRAINING.items():
        means = [statistics.fmean(line[name] for line in quarter) for quarter in quarters]
        lines.append(f"{label:30s}" + "".join(f"{mean:9.3f}" for mean in means))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="save_checkpoint_path of each run, or its log")
    try:
        log = average_logs([read_log(run) for run in parser.parse_args().runs])
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("\n".join([*validation_table(log), "", *training_table(log)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
