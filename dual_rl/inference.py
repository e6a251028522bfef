"""Scores a benchmark CSV and reports how often the rewards agree with people. See README.md.

    python inference.py --model_ckpt CHECKPOINT --data_path bench.csv --bench_type tabench --output results/bench.csv

From Python:

    from inference import RewardModel
    rewards, cots = RewardModel.from_pretrained(CHECKPOINT).score(["a.mp4"], ["a cat runs"])
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from scoring.bench_csv import BenchType
from scoring.benchmark import run_benchmark
from scoring.options import add_model_flags, configure_console
from scoring.report import format_result
from scoring.reward_model import RewardModel
from scoring.types import ScoringSettings
from verl.data.scored_sequence import REWARD_TOKEN
from verl.trainer.cluster import WorkerError

__all__ = ["RewardModel", "ScoringSettings"]
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", required=True, help="benchmark CSV")
    add("--bench_type", required=True, choices=get_args(BenchType), help="its format")
    add("--output", "--output_path", dest="output", required=True, help="CSV to write; JSON and journal beside it")
    add("--report", help="HTML page to write too: clips, thoughts, rewards and labels side by side, charts")
    add("--video_root", help="folder of relative video paths; default: the CSV's")
    add("--overwrite", action="store_true", help="drop what another run wrote to this output")
    add("--save_every", type=int, default=100, help="videos between two forced writes of the journal to disk")
    add("--num_workers", type=int, help="engines; default: one on each GPU, one on a CPU")
    add("--calibrate", action="store_true", help="keep mean and standard deviation of the rewards with the checkpoint")
    add(
        "--think_agreement",
        type=float,
        help="with --calibrate: keep a margin for --think_when_unsure, such that this "
        "share of pairs gets the verdict of always thinking",
    )
    add("--think_when_unsure", action="store_true", help="think only about pairs that are close without a thought")
    add("--special_token", default=REWARD_TOKEN, choices=[REWARD_TOKEN], help="where the reward is read")
    add_model_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 for a mistake or if nothing could be scored."""
    configure_console()
    try:
        result = run_benchmark(parse_arguments(argv))
    except (ValueError, OSError, WorkerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command resumes where it stopped\n")
        return INTERRUPTED
    sys.stdout.write(format_result(result) + "\n")
    return 0 if result["num_scored"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
