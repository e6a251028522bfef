"""Seconds and memory that checking a large CSV takes in both stages, and that planning a benchmark takes.

    python benchmarks/check_large_csv.py --output benchmarks/results/check_large_csv.json   (from dual_rl/)

Every row has two clips of its own, links to the shipped examples, and a CoT of its own. Each check runs twice, each
time in a new process: the second finds what the first remembered. Stage 2 finds the videos that stage 1 checked.
Memory is the peak resident size of the process; decoder processes take about 50 MB each on top.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import TINY_BASE, make_parser, write_result

STAGE = Path(__file__).resolve().parents[1]
RESULTS = STAGE / "results"
STAGE1 = STAGE.parent / "cold_start"
CLIPS = sorted((STAGE / "data" / "videos").glob("*.mp4"))
STAGE2_CHECK = """
import sys
from transformers import AutoProcessor
from verl.data.loading import check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.data.vision_process import VideoBudget
from verl.config import DataConfig

path = sys.argv[1] + "/pairs.csv"
processor = AutoProcessor.from_pretrained(sys.argv[2])
processor.tokenizer.add_tokens(["<Reward>"], special_tokens=True)
pairs = read_pairs(path, DataConfig(train_files=path, answer_key="GSB"))
check_pairs(pairs, SequenceBuilder(processor), VideoBudget(), max_prompt_length=4096, should_filter=False, source=path)
"""
BENCH_PLAN = """
import sys
from scoring.bench_csv import read_bench

read_bench(sys.argv[1] + "/bench.csv", "tabench")
"""


def write_data(folder: Path, num_rows: int) -> None:
    """Links to clips, a CSV for both stages, and one for a benchmark."""
    for index in range(2 * num_rows):
        os.link(CLIPS[index % len(CLIPS)], folder / f"{index}.mp4")
    with (folder / "pairs.csv").open("w", newline="") as pairs, (folder / "bench.csv").open("w", newline="") as bench:
        pair_writer, bench_writer = csv.writer(pairs), csv.writer(bench)
        pair_writer.writerow(["videos", "prompt", "CoT_A", "CoT_B", "GSB"])
        bench_writer.writerow(["video_A", "video_B", "prompt", "answer"])
        for row in range(num_rows):
            videos, prompt = [f"{2 * row}.mp4", f"{2 * row + 1}.mp4"], f"a red circle, number {row}"
            cots = [f"I see circle {row}, and it {verb} to the left. " * 20 for verb in ("moves", "jumps")]
            pair_writer.writerow([repr(videos), prompt, *cots, "AB"[row % 2]])
            bench_writer.writerow([*videos, prompt, "AB"[row % 2]])


def measure(command: list[str], stage: Path, folder: Path) -> dict[str, float]:
    """Seconds and peak memory in MB of one process of a stage."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(stage)}
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command[:4]} ended with status {status}"
    return {"seconds": round(time.monotonic() - start, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    result: dict[str, object] = {"rows": options.rows, "videos": 2 * options.rows, "cores": os.cpu_count()}
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS) as name:  # links do not cross file systems
        folder, model = Path(name), str(TINY_BASE)
        write_data(folder, options.rows)
        commands = {
            "stage 1": (["-m", "infer_utils.check_csv", f"{name}/pairs.csv", "--model", model], STAGE1),
            "stage 2": (["-c", STAGE2_CHECK, name, model], STAGE),
            "benchmark plan": (["-c", BENCH_PLAN, name], STAGE),
        }
        for what, (command, stage) in commands.items():
            result[what] = {run: measure(command, stage, folder) for run in ("first", "again")}
            write_result(result, options.output)
            sys.stdout.write(f"{what}: {json.dumps(result[what])}\n")


if __name__ == "__main__":
    main()
