"""How time and memory of the update grow with the work, on one GPU.

    python benchmarks/growth_8b.py --output results/growth_h100.json

One pair of benchmarks/pairs.py at a time, with more responses, longer ones, a longer video or more pairs. Each is run
with as many layers keeping their activations as fit (its time counts), and with none (its peak memory is the least
that the work needs). benchmarks/cost_model.py makes a formula of the result.
"""

import argparse
import json
import os
import sys

import torch

from pairs import WorkShape, make_work
from result_file import write_result
from shapes import DEVICE, TERA, measure_ceilings
from update_8b import Ours, make_parser, peak_gib, reset_peak

GROWTH = {
    "n": [{"n": n} for n in (2, 4, 8, 16)],
    "response_tokens": [{"response_tokens": (length, length)} for length in (300, 600, 1200, 2400)],
    "frames": [{"frames": (count, count), "prompt_tokens": 1300 + 98 * count} for count in (4, 12, 24, 48)],
    "pairs": [{"pairs": count} for count in (1, 2, 4)],
}
BASE = WorkShape(pairs=1)
PHASES = ("vision", "reference", "update")


def measure(ours: Ours, shape: WorkShape) -> dict:
    """Seconds and operations with kept activations, and the peak memory without."""
    plan = ours.runtime.activations
    work = make_work(ours.runtime.builder, shape)
    plan.max_kept = len(plan.layers)
    ours.run(work)
    run = ours.run(work)
    row = {
        "packed_tokens": sum(rollout.num_tokens for rollout in work.rollouts),
        "seconds": {name: run[name] for name in PHASES},
        "kept_layers": plan.num_kept,
        "teraflops": {name: flops / TERA for name, flops in ours.row_flops(work).items()},
    }
    plan.max_kept = 0
    reset_peak()
    ours.run(work)
    return {**row, "least_memory_gib": peak_gib()}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=GROWTH, default=list(GROWTH))
    parser.set_defaults(max_kept_layers=None)  # each shape is run with all and with none
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    ours = Ours(options, layers=options.layers)
    result = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "torch": torch.__version__,
        "model": f"Qwen3-VL-8B's shape ({options.layers} text layers), LoRA {options.lora_rank}, bf16, random weights",
        "text_attention": ours.text_attention,
        "ceilings": measure_ceilings(),
        "growth": {},
    }
    for axis in options.axes:
        rows = result["growth"][axis] = []
        for change in GROWTH[axis]:
            rows.append({**change, **measure(ours, WorkShape(**{**vars(BASE), **change}))})
            sys.stderr.write(f"{axis} {json.dumps(rows[-1])}\n")
        write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    sys.stdout.flush()
    os._exit(0)  # compilation's worker processes would hold the exit up


if __name__ == "__main__":
    main()
