"""Throughput of the reward server against offline scoring, one after the other.

    PYTHONPATH=. python benchmarks/serve_8b.py --work /tmp/work --output results/serve_h100.json
    PYTHONPATH=. python benchmarks/serve_8b.py --work /tmp/work --num_replicas 2 --videos 512 --clients 64

`--work` is what benchmarks/make_work.py wrote; any reward model and CSV of pairs will do (`--model`, `--data`). Both
score the same videos with the same flags: offline `RewardModel`, as inference.py uses it; then serve.py in a process
of its own, asked for one batch each over several connections at a time, by paths on the server. Each round has its own
prompts, so that no cache helps; the median round counts. Rewards must agree. `--num_replicas N` adds a third part, a
server with so many engines; give each of them several batches (`--videos`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import clock, describe_machine, make_parser, run_parts, write_result
from reward_client import RewardClient, ServerPath
from scoring.reward_model import RewardModel
from scoring.types import ScoringSettings
from verl.config import DataConfig
from verl.data.pair_csv import read_pairs

SERVE = Path(__file__).resolve().parents[1] / "serve.py"
WARMUP_VIDEOS = 4
SHARED = ("videos", "rounds", "clients", "batch_size", "max_new_tokens", "num_replicas")


def read_videos(options: argparse.Namespace) -> list[str]:
    """Paths of the first videos of the CSV."""
    pairs = read_pairs(options.data, DataConfig(train_files=str(options.data)))
    videos = [video for pair in pairs for video in pair.videos][: options.videos]
    assert len(videos) == options.videos, f"{options.data} has {len(videos)} videos, {options.videos} are asked for"
    return videos


def run_rounds(score: Callable[[list[str], list[str]], list[float]], options: argparse.Namespace) -> dict:
    """`seconds` of each round and `rewards` of all. `score`: videos and prompts to rewards, in order."""
    videos = read_videos(options)
    score(videos[:WARMUP_VIDEOS], ["warm up"] * WARMUP_VIDEOS)
    seconds, rewards = {}, []
    for number in range(options.rounds):
        prompts = [f"clip {video} of round {number} drifts over a plain background" for video in range(len(videos))]
        with clock(seconds, str(number)):
            rewards += score(videos, prompts)
    return {"seconds": list(seconds.values()), "rewards": rewards}


def score_offline(options: argparse.Namespace) -> dict:
    settings = ScoringSettings(batch_size=options.batch_size, max_new_tokens=options.max_new_tokens)
    with RewardModel.from_pretrained(options.model, settings=settings) as model:
        return run_rounds(lambda videos, prompts: model.score(videos, prompts).rewards, options)


def score_by_server(options: argparse.Namespace, num_replicas: int = 1) -> dict:
    """By a server that starts with the same flags."""
    flags = {name: str(getattr(options, name)) for name in ("port", "batch_size", "max_new_tokens")}
    flags |= {"num_replicas": str(num_replicas)}
    flags |= {"model_ckpt": str(options.model), "roots": str(Path(read_videos(options)[0]).parent)}
    server = subprocess.Popen([sys.executable, SERVE, *(f"--{name}={value}" for name, value in flags.items())])
    share = -(-options.videos // options.clients)
    client = RewardClient(
        f"http://127.0.0.1:{options.port}", timeout=600, batch_size=share, num_connections=options.clients
    )

    def ask(videos: list[str], prompts: list[str]) -> list[float]:
        scores = client.score([ServerPath(video) for video in videos], prompts)
        assert all(score.error is None for score in scores), scores
        return [score.reward for score in scores]

    try:
        client.wait_until_ready(seconds=900)
        return run_rounds(ask, options)
    finally:
        server.terminate()
        server.wait(90)


def score_by_replicas(options: argparse.Namespace) -> dict:
    return score_by_server(options, options.num_replicas)


PARTS = {"offline": score_offline, "server": score_by_server, "replicas": score_by_replicas}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", type=Path, help="default: WORK/model")
    parser.add_argument("--data", type=Path, help="default: WORK/train.csv")
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--num_replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    options.model = options.model or options.work / "model"
    options.data = options.data or options.work / "train.csv"
    return options


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        chosen = list(PARTS)[: 3 if options.num_replicas > 1 else 2]
        parts = dict(run_parts(PARTS, chosen, options, Path(folder)))
    served = [reward for name in chosen[1:] for reward in parts[name]["rewards"]]
    offline = parts["offline"]["rewards"] * (len(chosen) - 1)
    distances = [abs(a - b) for a, b in zip(offline, served, strict=True)]
    rates = {name: options.videos / statistics.median(part["seconds"]) for name, part in parts.items()}
    result = {
        **describe_machine(),
        **{name: getattr(options, name) for name in SHARED},
        "seconds": {name: part["seconds"] for name, part in parts.items()},
        "videos_per_second": rates,
        "server_by_offline": rates["server"] / rates["offline"],
        **({"replicas_by_server": rates["replicas"] / rates["server"]} if "replicas" in rates else {}),
        "largest_distance_of_rewards": max(distances),
    }
    write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
