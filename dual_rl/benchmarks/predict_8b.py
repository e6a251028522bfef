"""What steps of stage 2 cost by benchmarks/cost_model.py, and a measured step of ours against the original's.

    PYTHONPATH=. python benchmarks/predict_8b.py --output benchmarks/results/cost_model.json

Reads growth_h100.json, lora64_h100.json and update_h100.json of benchmarks/results/ and needs no GPU. The original's
step is composed of measured parts: see `compare_steps`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from cost_model import PHASES, CostModel, MeasuredRow, Paper, StepShape, fit_model, read_rows
from result_file import write_result
from shapes import build_config

RESULTS = Path(__file__).resolve().parent / "results"
FILES = ("growth_h100.json", "lora64_h100.json", "update_h100.json")
TOKENIZER = RESULTS.parents[2] / "cold_start" / "model" / "tiny_base"
BUS_GB_PER_SECOND = 329.0
"""Of an all-reduce between two H100 of one host."""
ORIGINAL_PASSES = ("old", "reference", "update")
WHOLE_STEP = StepShape(pairs=8, n=8, frames=10, longest_tokens=1000)
"""What benchmarks/train_8b.sh runs by default; its results say how long prompts and responses were."""


def read_step(median: Mapping[str, float]) -> tuple[StepShape, dict[str, float]]:
    """The shape of a step, and its seconds by phase, from the medians of benchmarks/summarize.py."""
    seconds = {name: median[f"timing/seconds/{name}"] for name in ("generate", "prepare", "update", "hand_over")}
    response = median["response_length/mean"]
    prompt = median["perf/packed_tokens"] / (2 * WHOLE_STEP.pairs) - WHOLE_STEP.n * (response + 1)
    return replace(WHOLE_STEP, prompt_tokens=prompt, response_tokens=response), seconds


def compare_steps(shape: StepShape, seconds: Mapping[str, float], update: Mapping) -> dict:
    """Seconds of a step of ours as measured, and of the original's algorithm, by phase; `ratio` of the sums.

    `update`: a result of update_8b.py. The original's step has the same rollouts, no hand-over, and its passes over
    one pair times tokens / tokens, where every response has a copy of its prompt. That takes attention for linear,
    which leaves out a few percent, and vision, a cost of each sequence, for growing with it, which adds about as much.
    """
    original, response = update["original"], shape.response_tokens + 1
    repeated = 2 * shape.pairs * shape.n * (shape.prompt_tokens + response)
    theirs = {"generate": seconds["generate"]}
    theirs |= {name: original["seconds"][name] * repeated / original["tokens"] for name in ORIGINAL_PASSES}
    return {
        "tokens": {"ours": 2 * shape.pairs * (shape.prompt_tokens + shape.n * response), "original": repeated},
        "ours": dict(seconds),
        "original": theirs,
        "ratio": sum(theirs.values()) / sum(seconds.values()),
    }


SETTINGS = {
    "n": (StepShape(pairs=8), (4, 8, 16, 32)),
    "response_tokens": (StepShape(pairs=8), (300, 600, 1200)),
    "frames": (StepShape(pairs=8), (12, 24, 48)),
    "pairs": (StepShape(), (8, 32, 128)),
    "gpus": (StepShape(pairs=128), (1, 2, 4, 8)),
}


def describe_fit(rows: Sequence[MeasuredRow], model: CostModel) -> Iterator[dict]:
    """Mean and largest errors: of seconds relative to the measured ones, of the least memory in GiB (one pair)."""
    by_row = [(row, model.seconds(row.teraflops, pairs=row.shape.pairs)) for row in rows]
    errors = {name: [abs(fit[name] / row.seconds[name] - 1) for row, fit in by_row] for name in PHASES}
    single = [row for row in rows if row.shape.pairs == 1]
    errors["least_gib"] = [abs(model.least_memory_gib(row.row_tokens) - row.least_memory_gib) for row in single]
    for name, values in errors.items():
        yield {"fit": name, "mean_error": float(np.mean(values)), "largest_error": max(values)}


def describe_rows(rows: Sequence[MeasuredRow], paper: Paper) -> Iterator[dict]:
    """Seconds of vision, reference and update together: measured, fitted (operations as counted), and on paper."""
    for row in rows:
        on_paper = paper.predict(row.drawn_shape)
        yield {
            "axis": row.axis,
            "value": getattr(row.shape, row.axis),
            "tokens": row.packed_tokens,
            "seconds": sum(row.seconds[name] for name in PHASES),
            "fitted": sum(paper.model.seconds(row.teraflops, pairs=row.shape.pairs).values()),
            "on_paper": sum(on_paper[name] for name in PHASES),
            "kept_layers": row.kept_layers,
            "kept_fitted": paper.model.count_kept_layers(row.row_tokens, layers=paper.layers),
            "least_gib": row.least_memory_gib,
            "gib_fitted": paper.model.least_memory_gib(row.row_tokens),
        }


def describe_step(shape: StepShape, seconds: Mapping[str, float], paper: Paper) -> Iterator[dict]:
    """Seconds of a whole step. `to_longest`: weights are read as often as the longest response has tokens."""
    shapes = {"on_paper": replace(shape, longest_tokens=None), "to_longest": shape}
    costs = {name: paper.predict(shape) for name, shape in shapes.items()}
    for phase, parts in (("generate", ["generate"]), ("prepare", ["vision", "reference"]), ("update", ["update"])):
        predicted = {name: sum(cost[part] for part in parts) for name, cost in costs.items()}
        yield {"phase": phase, "seconds": seconds[phase], **predicted}


def predict_settings(paper: Paper) -> Iterator[dict]:
    """What a handful of settings cost on paper."""
    for axis, (base, values) in SETTINGS.items():
        for shape in (base.change(axis, value) for value in values):
            row = {"axis": axis, "value": getattr(shape, axis), "pairs": shape.pairs, **paper.predict(shape)}
            yield {**row, "basis": "computed, not measured" if shape.gpus > 1 else "computed from one GPU"}


def compute_all(results: Path, tokenizer: Path, *, bus_gb_per_second: float) -> dict:
    """Everything that is written, from the files of the folder `results`."""
    growth, step, update = (json.loads((results / name).read_text()) for name in FILES)
    config, rows, whole = build_config(str(tokenizer)), list(read_rows(growth)), read_step(step["median"])
    copy_speed = growth["ceilings"]["copy_gb_per_second"]
    model = fit_model(rows, layers=config.text_config.num_hidden_layers, copy_gb_per_second=copy_speed)
    paper = Paper(model, config, bus_gb_per_second=bus_gb_per_second)
    return {
        "device": growth["device"],
        "model": asdict(model),
        "fit": list(describe_fit(rows, model)),
        "rows": list(describe_rows(rows, paper)),
        "whole_step": list(describe_step(*whole, paper)),
        "against_original": compare_steps(*whole, update),
        "on_paper": list(predict_settings(paper)),
    }


def format_table(title: str, rows: Sequence[Mapping]) -> str:
    """A title, and columns as the first row names them."""
    cells = [list(rows[0]), *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join([title, *(f"  {line}" for line in lines), "", ""])


def describe_all(result: Mapping) -> str:
    """Tables for readers."""
    both = result["against_original"]
    phases = dict.fromkeys((*both["ours"], *both["original"]))
    steps = [{"phase": name, **{who: both[who].get(name, 0.0) for who in ("ours", "original")}} for name in phases]
    tables = {
        f"Model of one {result['device']}": [{"field": name, "value": x} for name, x in result["model"].items()],
        "Errors of its fit: relative; of the least memory in GiB": result["fit"],
        "Seconds of vision, reference and update: measured, fitted, on paper": result["rows"],
        "Seconds of a whole step, to which nothing is fitted": result["whole_step"],
        f"Seconds of that step, and composed by the original's algorithm: {both['ratio']:.2f} times as many": steps,
        "On paper: a step of 8 responses of 600 tokens on 12 frames unless changed": result["on_paper"],
    }
    return "".join(format_table(title, rows) for title, rows in tables.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder with {', '.join(FILES)}")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder of a Qwen3-VL model")
    parser.add_argument("--bus_gb_per_second", type=float, default=BUS_GB_PER_SECOND, help="between GPUs")
    options = parser.parse_args()
    result = compute_all(options.results, options.tokenizer, bus_gb_per_second=options.bus_gb_per_second)
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))
    write_result(result, options.output)
    sys.stdout.write(describe_all(result))


if __name__ == "__main__":
    main()
