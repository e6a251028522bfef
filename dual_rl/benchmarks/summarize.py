"""Turns the log of a benchmark run into a small JSON and a table: medians over all steps but the first.

python benchmarks/summarize.py RUN_FOLDER --output result.json --settings worker.actor.model.lora.rank=64
"""

import json
import statistics
import sys
from pathlib import Path

from harness import describe_machine, make_parser, write_result

SHOWN = (
    "perf/packed_tokens",
    "perf/tokens_per_second_per_device",
    "perf/update_memory_gib",
    "perf/rollout_memory_gib",
    "response_length/mean",
    "rollout/log_prob_difference_mean",
    "rollout/log_prob_difference_max",
)
STEP = "timing/seconds/step"


def without_saving(line: dict[str, float]) -> dict[str, float]:
    """A line of the log whose step ends before validation and saving, which not every step has."""
    extra = sum(line.get(f"timing/seconds/{phase}", 0.0) for phase in ("validate", "save"))
    return {**line, STEP: line[STEP] - extra}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--settings", nargs="*", default=[], help="what the run was given beside its defaults")
    arguments = parser.parse_args()
    log = arguments.run / "train_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    steps = [without_saving(line) for line in lines if STEP in line]
    if not steps:
        sys.exit(f"{log}: no step was completed, there is nothing to summarize")
    later = steps[1:] or steps
    phases = sorted(name for name in later[0] if name.startswith("timing/seconds/"))
    shown = [name for name in (*phases, *SHOWN) if name in later[0]]
    result = {
        **describe_machine(),
        "settings": arguments.settings,
        "num_steps": len(steps),
        "seconds_by_step": [round(line[STEP], 2) for line in steps],
        "median": {name: statistics.median(line[name] for line in later) for name in shown},
        "save_seconds": steps[-1].get("timing/seconds/save"),
    }
    write_result(result, arguments.output)
    for name, value in result["median"].items():
        sys.stdout.write(f"{name:40s} {value:12.4g}\n")


if __name__ == "__main__":
    main()
