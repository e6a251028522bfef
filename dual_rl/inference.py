"""Scores a benchmark CSV and reports how often the rewards agree with people. README.md says more.

    python inference.py --model_ckpt CHECKPOINT --data_path bench.csv --bench_type tabench --output results/bench.csv

From Python:

    from inference import RewardModel
    rewards, cots = RewardModel.from_pretrained(CHECKPOINT).score(["a.mp4"], ["a cat runs"])
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import get_args

from transformers.utils import logging as transformers_logging

from verl.data.scored_sequence import REWARD_TOKEN
from verl.inference.bench_csv import BenchType
from verl.inference.benchmark import BenchmarkRun, describe_result, run_benchmark
from verl.inference.fleet import ModelSource
from verl.inference.reward_model import RewardModel
from verl.inference.scoring import ScoringSettings
from verl.trainer.cluster import WorkerError

__all__ = ["RewardModel", "ScoringSettings"]
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; defaults of scoring are those of `ScoringSettings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ScoringSettings()
    add = parser.add_argument
    add("--data_path", required=True, help="benchmark CSV")
    add("--bench_type", required=True, choices=get_args(BenchType), help="its format")
    add("--model_ckpt", required=True, help="stage 1 checkpoint-N, stage 2 global_step_N, or a merged model")
    add("--rm_ckpt", help="rm_head.pth; default: the one beside the model")
    add("--output", "--output_path", dest="output", required=True, help="CSV to write; JSON and journal beside it")
    add("--batch_size", type=int, default=default.batch_size, help="videos in an engine at a time")
    add("--special_token", default=REWARD_TOKEN, choices=[REWARD_TOKEN], help="where the reward is read")
    add("--save_every", type=int, default=100, help="videos between two forced writes of the journal to disk")
    add("--seed", type=int, default=0, help="of the bootstrap, and of the head with --fresh_head")
    add("--backend", choices=["vllm", "hf"], default=default.backend, help="hf: plain transformers")
    add("--num_workers", type=int, help="engines; default: one on each GPU, one on a CPU")
    add(
        "--max_prompt_length",
        type=int,
        default=default.max_prompt_length,
        help="tokens, the video's included; default: what the model takes",
    )
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="tokens of the chain of thought")
    add("--repetition_penalty", type=float, default=default.repetition_penalty)
    add("--precision", choices=["auto", "bf16", "fp32"], default=default.precision, help="auto: bf16 on GPUs")
    add("--gpu_memory_utilization", type=float, default=default.gpu_memory_utilization)
    add("--enforce_eager", action="store_true", help="start faster, write slower")
    add("--num_threads", type=int, default=default.num_threads, help="that decode videos, per engine")
    add("--video_fps", type=float, help="default, like --max_pixels: as the model was trained")
    add("--max_pixels", type=int)
    add("--report", help="HTML page to write too: clips, thoughts, rewards and labels side by side, charts")
    add("--video_root", help="folder of relative video paths; default: the CSV's")
    add("--fresh_head", action="store_true", help="score a base model with an untrained head, for comparison")
    add("--calibrate", action="store_true", help="keep mean and standard deviation of the rewards with the checkpoint")
    add("--normalize", action="store_true", help="give rewards on the scale that --calibrate kept")
    add("--overwrite", action="store_true", help="drop what another run wrote to the same output")
    return parser.parse_args(argv)


def build_run(options: argparse.Namespace) -> BenchmarkRun:
    """Raises ValueError for settings that cannot be."""
    chosen = vars(options)
    settings = ScoringSettings(
        **{name: chosen[name] for name in ScoringSettings.__dataclass_fields__ if name in chosen}
    )
    source = ModelSource(options.model_ckpt, options.rm_ckpt, settings, options.seed if options.fresh_head else None)
    names = [name for name in BenchmarkRun.__dataclass_fields__ if name != "source"]
    return BenchmarkRun(source=source, **{name: chosen[name] for name in names})


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 for a mistake or when nothing could be scored."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("verl").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        result = run_benchmark(build_run(parse_arguments(argv)))
    except (ValueError, WorkerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues where it stopped\n")
        return INTERRUPTED
    sys.stdout.write(describe_result(result) + "\n")
    return 0 if result["num_scored"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
