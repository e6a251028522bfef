"""Make several clips per held-out prompt of the toy world, for best-of-N selection.

    python make_best_of_n.py --output ~/best_of_n --prompts 100 --clips 8

writes a folder per prompt, with `prompt.txt` and the clips, and `truth.csv`: folder, video, true_score (the overall
score of the true sub-scores, 1 to 5). Up to 10,000 evaluation pairs, make_toy_world.py makes none of these prompts.
The same arguments give the same files.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import GENERATORS, choose, overall_score, sample_clip_scene, sample_request, true_scores
from toy_world.tables import Row, write_table
from toy_world.texts import write_prompt
from toy_world.world import SPLITS

FIRST_INDEX = 10_000


def make_prompt(output: Path, clips: int, seed: int, index: int) -> list[Row]:
    """Write one prompt's folder; returns its rows of truth.csv."""
    rng = np.random.default_rng([seed, SPLITS.index("eval"), FIRST_INDEX + index])
    request = sample_request(rng, held_out=True)
    folder = output / f"prompt_{index:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompt.txt").write_text(write_prompt(request, rng) + "\n")
    rows = []
    for number in range(clips):
        scene = sample_clip_scene(request, rng, held_out=True, generator=choose(rng, tuple(GENERATORS)))
        encode_clip(folder / f"{number}.mp4", scene, sample_nuisance(rng))
        score = round(overall_score(true_scores(request, scene)), 4)
        rows.append({"folder": folder.name, "video": f"{number}.mp4", "true_score": score})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--clips", type=int, default=8, help="clips per prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor() as pool:
        make = partial(make_prompt, options.output, options.clips, options.seed)
        rows = [row for of_prompt in pool.map(make, range(options.prompts)) for row in of_prompt]
    write_table(options.output / "truth.csv", rows)


if __name__ == "__main__":
    main()
