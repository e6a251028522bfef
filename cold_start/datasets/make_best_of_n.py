"""Makes several clips for each of some held-out prompts of the toy world, for best-of-N selection.

    python make_best_of_n.py --output ~/best_of_n --prompts 100 --clips 8

writes a folder for each prompt, with `prompt.txt` and the clips, and `truth.csv`: folder, video, true_score (the
overall score of the true sub-scores, 1 to 5). Prompts are others than those that
make_toy_world.py holds out, up to 10,000 pairs. The same arguments give the same files.
"""

import argparse
import csv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import (
    GENERATORS,
    choose,
    overall_score,
    sample_clip_scene,
    sample_request,
    true_scores,
    write_prompt,
)
from toy_world.world import SPLITS

FIRST_INDEX = 10_000


def make_prompt(folder: Path, index: int, *, clips: int, seed: int) -> list[tuple[str, str, float]]:
    """Write one prompt's folder; returns the rows of truth.csv."""
    rng = np.random.default_rng([seed, SPLITS.index("eval"), FIRST_INDEX + index])
    request = sample_request(rng, True)
    inner = folder / f"prompt_{index:03d}"
    inner.mkdir(parents=True, exist_ok=True)
    (inner / "prompt.txt").write_text(write_prompt(request, rng) + "\n")
    rows = []
    for number in range(clips):
        scene = sample_clip_scene(request, rng, True, generator=choose(rng, tuple(GENERATORS)))
        encode_clip(inner / f"{number}.mp4", scene, sample_nuisance(rng))
        rows.append((inner.name, f"{number}.mp4", round(overall_score(true_scores(request, scene)), 4)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--clips", type=int, default=8, help="for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        jobs = [
            pool.submit(make_prompt, options.output, index, clips=options.clips, seed=options.seed)
            for index in range(options.prompts)
        ]
        rows = [row for job in jobs for row in job.result()]
    with (options.output / "truth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["folder", "video", "true_score"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
