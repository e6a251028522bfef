"""Three dimensions in one model against three models, on the toy world: accuracy in each, and seconds of training.

    PYTHONPATH=. python benchmarks/dimensions.py --work /tmp/dimensions --output benchmarks/results/dimensions.json

Trains the tiny base four times with the settings of quickstart.sh: on VQ, MQ and TA at once, and on each alone. Pairs
are compared one by one: the difference of accuracies has a 95% interval by bootstrap over the held-out pairs. A killed
run continues where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

STAGE_DIR = Path(__file__).resolve().parents[1]
DIMENSIONS = ("VQ", "MQ", "TA")
MODES = ("csv", "masked")
TRAINING = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "merger_lr": 5e-6,
    "vision_lr": 5e-6,
    "special_token_lr": 1e-2,
    "rm_head_lr": 1e-2,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 1,
    "save_epochs": 1,
    "resume_from_checkpoint": "latest",
    "report_to": "none",
}


def call(*command: object, **environment: object) -> None:
    """Run a command of this stage, which must succeed."""
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    subprocess.run([str(part) for part in command], cwd=STAGE_DIR, env=variables, check=True)


def train(names: tuple[str, ...], options: argparse.Namespace) -> dict:
    """The evaluation of a model trained on the columns `names`, by dimension, and the seconds of its steps."""
    run = options.work / "-".join(names)
    processes = min(2, os.cpu_count() or 1)
    paths = {"MODEL_PATH": "model/tiny_base", "DATA": options.work / "world/train.csv", "OUTPUT_DIR": run}
    counts = {"NUM_GPUS": 0, "NUM_PROCESSES": processes, "OMP_NUM_THREADS": 1}
    settings = TRAINING | {"per_device_train_batch_size": 8 // processes}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    call("bash", "train.sh", *flags, "--eval_dim", *names, **paths, **counts)
    checkpoint = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    evaluation = (sys.executable, "-m", "infer_utils.evaluate", checkpoint, options.work / "world/eval.csv")
    call(*evaluation, "--modes", *MODES, "--eval_dim", *names, "--output", run / "result.json")
    result = json.loads((run / "result.json").read_text())
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return {
        "by_dimension": result.get("dimensions", {names[0]: result}),
        "seconds_per_step": float(np.median([line["seconds_per_step"] for line in log if "seconds_per_step" in line])),
        "steps": max(line["step"] for line in log),
    }


def compare(together: dict, alone: dict, mode: str) -> dict[str, float]:
    """Accuracies over the pairs with a preference, and their difference with its interval."""
    right = [
        np.array(
            [
                (r[mode][0] - r[mode][1]) * {"A": 1, "B": -1}[r["label"]] > 0
                for r in model["pairs"]
                if r["label"] in "AB"
            ]
        )
        for model in (together, alone)
    ]
    difference = right[0].astype(float) - right[1]
    draws = np.random.default_rng(0).integers(len(difference), size=(4000, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    names = ("together", "alone", "difference", "low", "high", "num_pairs")
    values = (right[0].mean(), right[1].mean(), difference.mean(), low, high, len(difference))
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for videos and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--train_pairs", type=int, default=400)
    parser.add_argument("--eval_pairs", type=int, default=300)
    options = parser.parse_args()
    options.work = options.work.resolve()
    sizes = ("--train_pairs", options.train_pairs, "--eval_pairs", options.eval_pairs)
    call(sys.executable, "datasets/make_toy_world.py", "--output", options.work / "world", *sizes)
    models = {"-".join(names): train(names, options) for names in (DIMENSIONS, *((name,) for name in DIMENSIONS))}
    together = models["-".join(DIMENSIONS)]
    seconds = {name: round(model["seconds_per_step"] * model["steps"], 1) for name, model in models.items()}
    accuracy = {
        name: {
            mode: compare(together["by_dimension"][name], models[name]["by_dimension"][name], mode) for mode in MODES
        }
        for name in DIMENSIONS
    }
    sizes = {"train_pairs": options.train_pairs, "eval_pairs": options.eval_pairs}
    text = json.dumps({**sizes, "training_seconds": seconds, "accuracy": accuracy}, indent=2)
    options.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
