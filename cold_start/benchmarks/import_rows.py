"""Seconds and memory of importing a large set: `PYTHONPATH=. python benchmarks/import_rows.py --rows 100000`.

Writes VideoGen-RewardBench's form with 2,000 empty videos, imports it in another process, prints a line of JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

NUM_VIDEOS = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        videos.mkdir()
        for index in range(NUM_VIDEOS):
            (videos / f"{index}.mp4").touch()
        names = pd.Series(range(rows)) % NUM_VIDEOS
        table = {
            "path_A": names.map("videos/{}.mp4".format),
            "path_B": ((names + 1) % NUM_VIDEOS).map("{}.mp4".format),
        }
        labels = {name: "A" for name in ("VQ", "MQ", "TA", "Overall")}
        prompts = [f"prompt number {index}, with some more words to read" for index in range(rows)]
        table |= {"A_model": "one", "B_model": "other", "prompt": prompts, **labels}
        pd.DataFrame(table).to_csv(Path(folder) / "videogen-rewardbench.csv", index=False)
        command = [sys.executable, "-m", "infer_utils.import_data", "videogen-rewardbench", "--source", folder]
        start = time.perf_counter()
        subprocess.run([*command, "--output", f"{folder}/out"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"rows": rows, "seconds": round(seconds, 1), "memory_mib": round(memory)}) + "\n")


if __name__ == "__main__":
    main()
