"""Turns the log of a benchmark run into a small JSON and a table: medians over all steps but the first.

python benchmarks/summarize.py RUN_FOLDER --output result.json --settings worker.actor.model.lora.rank=64
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from result_file import write_result

SHOWN = (
    "perf/packed_tokens",
    "perf/tokens_per_second_per_device",
    "perf/update_memory_gib",
    "perf/rollout_memory_gib",
    "response_length/mean",
    "rollout/log_prob_difference_mean",
    "rollout/log_prob_difference_max",
)


def without_saving(line: dict[str, float]) -> dict[str, float]:
    """A line of the log whose step ends before validation and saving, which come now and then."""
    extra = sum(line.get(f"timing/seconds/{phase}", 0.0) for phase in ("validate", "save"))
    return {**line, "timing/seconds/step": line["timing/seconds/step"] - extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", nargs="*", default=[], help="what the run was given beside its defaults")
    arguments = parser.parse_args()
    log = arguments.run / "train_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    steps = [without_saving(line) for line in lines if "timing/seconds/step" in line]
    if not steps:
        sys.exit(f"{log}: no step was completed, nothing to sum up")
    later = steps[1:] or steps
    phases = sorted(name for name in later[0] if name.startswith("timing/seconds/"))
    shown = [name for name in (*phases, *SHOWN) if name in later[0]]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "device": device,
        "torch": torch.__version__,
        "settings": arguments.settings,
        "num_steps": len(steps),
        "seconds_by_step": [round(line["timing/seconds/step"], 2) for line in steps],
        "median": {name: statistics.median(line[name] for line in later) for name in shown},
        "save_seconds": steps[-1].get("timing/seconds/save"),
    }
    write_result(result, arguments.output)
    for name, value in result["median"].items():
        sys.stdout.write(f"{name:40s} {value:12.4g}\n")


if __name__ == "__main__":
    main()
