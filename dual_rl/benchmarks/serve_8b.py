"""Throughput of the reward server against offline scoring, one after the other in one call.

    python benchmarks/serve_8b.py --work /tmp/work --output results/serve_h100.json

`--work` is what benchmarks/make_work.py wrote; any reward model and CSV of pairs will do (`--model`, `--data`). Both
score the same videos with the same flags: offline `RewardModel`, as inference.py uses it; then serve.py in a process
of its own, asked by several clients at a time for one batch each, by paths on the server. Rounds have prompts of their
own, so that no cache helps; the median round counts. Rewards must agree.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import write_result
from reward_client import RewardClient, ServerPath
from verl.config import DataConfig
from verl.data.pair_csv import read_pairs

DUAL_RL = Path(__file__).resolve().parents[1]
WARMUP_VIDEOS = 4


def read_videos(path: Path, count: int) -> list[str]:
    """Paths of the first `count` videos of a CSV of pairs."""
    pairs = read_pairs(path, DataConfig(train_files=str(path)))
    videos = [video for pair in pairs for video in pair.videos][:count]
    assert len(videos) == count, f"{path} has {len(videos)} videos, {count} are asked for"
    return videos


def run_rounds(score, options: argparse.Namespace) -> dict:
    """`seconds` of each round and `rewards` of all. `score`: videos and prompts to rewards, in order."""
    videos = read_videos(options.data, options.videos)
    score(videos[:WARMUP_VIDEOS], ["warm up"] * WARMUP_VIDEOS)
    seconds, rewards = [], []
    for number in range(options.rounds):
        prompts = [f"clip {video} of round {number} drifts over a plain background" for video in range(len(videos))]
        start = time.perf_counter()
        rewards += score(videos, prompts)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "rewards": rewards}


def score_offline(options: argparse.Namespace) -> dict:
    """In this process, which ends with it and frees the device."""
    from scoring.reward_model import RewardModel
    from scoring.types import ScoringSettings

    settings = ScoringSettings(batch_size=options.batch_size, max_new_tokens=options.max_new_tokens)
    with RewardModel.from_pretrained(options.model, settings=settings) as model:
        return run_rounds(lambda videos, prompts: model.score(videos, prompts).rewards, options)


def score_by_server(options: argparse.Namespace) -> dict:
    """By a server that starts with the same flags."""
    root = str(Path(read_videos(options.data, 1)[0]).parent)
    command = [
        sys.executable, str(DUAL_RL / "serve.py"), "--model_ckpt", str(options.model), "--port", str(options.port),
        "--roots", root, "--batch_size", str(options.batch_size), "--max_new_tokens", str(options.max_new_tokens),
    ]  # fmt: skip
    server = subprocess.Popen(command)
    client = RewardClient(f"http://127.0.0.1:{options.port}", timeout=600)

    def ask(videos: list[str], prompts: list[str]) -> list[float]:
        scores = client.score([ServerPath(video) for video in videos], prompts)
        assert all(score.error is None for score in scores), scores
        return [score.reward for score in scores]

    def ask_in_parallel(videos: list[str], prompts: list[str]) -> list[float]:
        rewards = [0.0] * len(videos)
        shares = [range(len(videos))[n :: options.clients] for n in range(min(options.clients, len(videos)))]
        with ThreadPoolExecutor(options.clients) as pool:
            jobs = [pool.submit(ask, [videos[n] for n in share], [prompts[n] for n in share]) for share in shares]
        for share, job in zip(shares, jobs, strict=True):
            for number, reward in zip(share, job.result(), strict=True):
                rewards[number] = reward
        return rewards

    try:
        client.wait_until_ready(seconds=900)
        return run_rounds(ask_in_parallel, options)
    finally:
        server.terminate()
        server.wait(60)


PARTS = {"offline": score_offline, "server": score_by_server}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", type=Path, help="default: WORK/model")
    parser.add_argument("--data", type=Path, help="default: WORK/train.csv")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--part", choices=PARTS, help="run one part only, and print its result as the last line")
    options = parser.parse_args()
    options.model = options.model or options.work / "model"
    options.data = options.data or options.work / "train.csv"
    if options.part:
        sys.stdout.write("\n" + json.dumps(PARTS[options.part](options)) + "\n")
        return
    results = {}
    for part in PARTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[part] = json.loads(output.splitlines()[-1])
    distances = [abs(a - b) for a, b in zip(results["offline"]["rewards"], results["server"]["rewards"], strict=True)]
    rates = {part: options.videos / statistics.median(result["seconds"]) for part, result in results.items()}
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("videos", "rounds", "clients", "batch_size", "max_new_tokens")},
        "seconds": {part: result["seconds"] for part, result in results.items()},
        "videos_per_second": rates,
        "server_by_offline": rates["server"] / rates["offline"],
        "largest_distance_of_rewards": max(distances),
    }
    write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
