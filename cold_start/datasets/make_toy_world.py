"""Make the toy world data set: clips, preference pairs with CoTs, stage 2 answers, and benchmark files.

    python make_toy_world.py --output ~/toy_world --train_pairs 600 --eval_pairs 200 --workers 2

writes into the output folder
    videos/*.mp4                             H.264 clips of 2 to 4 seconds, sides of 80 to 144 pixels
    train.csv, eval.csv                      stage 1: videos, problem, durations, prompt, CoT_A, CoT_B, GSB, MOS_*_GSB
    train_rl.csv, eval_rl.csv                stage 2: videos, problem, answer (true sub-scores and label)
    bench_{tabench,videoalign,genai,react,videofeedback}.csv      the held-out pairs in the benchmarks' columns
    manifest.json                            seed, counts, every rate as intended and as measured
`--in_domain_pairs` and `--new_rendering_pairs` add two held-out sets: other clips of training's combinations in the
usual and in a changed rendering. bench_held_out.csv then holds all held-out pairs, with their set in the column `set`.

See toy_world/scene.py for the scoring rules, toy_world/world.py for the sampling of pairs, train/README.md and
eval/README.md for the columns. The same arguments give the same files. The same command resumes an interrupted run;
clips made with other settings, or by another version of this code, are removed first. `--example --output train` makes
the example in train/.
"""

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from toy_world.render import encode_clip
from toy_world.tables import build_tables, training_row, write_table
from toy_world.world import SPLITS, Clip, Pair, WorldConfig, measure_rates, sample_pair

FORMAT_NAME = "toy_world"
EXAMPLE_LABELS = ("A", "B", "same", "A")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the toy world data set.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    for split, count in zip(SPLITS, (600, 200, 0, 0), strict=True):
        parser.add_argument(f"--{split}_pairs", type=int, default=count)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    parser.add_argument("--seed", type=int, default=WorldConfig.seed)
    parser.add_argument("--example", action="store_true", help="only write example.csv with four pairs of small clips")
    return parser.parse_args(arguments)


def make_world(
    output: Path, config: WorldConfig, *, num_pairs: dict[str, int], workers: int, judge_problem: Callable[[str], str]
) -> dict[str, object]:
    """Write `num_pairs` by split and return the manifest. Raises ValueError if the folder holds anything else."""
    pairs = {split: [sample_pair(config, split, i) for i in range(count)] for split, count in num_pairs.items()}
    clips = [clip for of_split in pairs.values() for pair in of_split for clip in pair.clips]
    manifest = {"format": FORMAT_NAME, "settings_hash": hash_settings(config), "complete": False}
    prepare_output(output, manifest, {clip.name for clip in clips})
    missing = [clip for clip in clips if not (output / "videos" / clip.name).is_file()]
    context = multiprocessing.get_context("spawn")  # the encoder's libraries do not always survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = pool.map(partial(render_clip, output / "videos"), missing, chunksize=8)
        list(tqdm(done, total=len(missing), desc="render", unit="clip", disable=None))
    for name, rows in build_tables(pairs, judge_problem).items():
        write_table(output / name, rows)
    manifest |= {
        "complete": True,
        "intended": asdict(config),
        "measured": {split: measure_rates(of_split) for split, of_split in pairs.items()},
        "num_pairs": num_pairs,
        "num_clips": len(clips),
    }
    write_manifest(output, manifest)
    return manifest


def hash_settings(config: WorldConfig) -> str:
    """A digest of everything that clips depend on: settings, the code of toy_world, the encoder's version."""
    digest = hashlib.sha256(json.dumps(asdict(config)).encode() + importlib.metadata.version("av").encode())
    for path in sorted((Path(__file__).resolve().parent / "toy_world").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def prepare_output(output: Path, manifest: dict[str, object], names: set[str]) -> None:
    """Make the folder; remove clips that have other settings or are not among `names`."""
    path = output / "manifest.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("format") != FORMAT_NAME and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and is not a toy world. Choose another --output.")
    (output / "videos").mkdir(parents=True, exist_ok=True)
    for clip in (output / "videos").glob("*_?????_?.mp4*"):
        if found.get("settings_hash") != manifest["settings_hash"] or clip.name not in names:
            clip.unlink()
    write_manifest(output, manifest)


def write_manifest(output: Path, manifest: dict[str, object]) -> None:
    temporary = output / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, output / "manifest.json")


def render_clip(folder: Path, clip: Clip) -> None:
    encode_clip(folder / clip.name, clip.scene, clip.nuisance)


def sample_example(config: WorldConfig) -> list[Pair]:
    """The first training pairs with EXAMPLE_LABELS; their clips have small frames and last two seconds."""
    pairs, index = [], 0
    while len(pairs) < len(EXAMPLE_LABELS):
        pair = sample_pair(config, "train", index)
        index += 1
        if pair.label == pair.true_label == EXAMPLE_LABELS[len(pairs)]:
            clips = []
            for side, clip, width in zip("ab", pair.clips, (112, 100), strict=True):
                nuisance = replace(clip.nuisance, width=width, height=104, fps=8, duration=2.0, crf=26)
                clips.append(replace(clip, name=f"example_{len(pairs)}_{side}.mp4", nuisance=nuisance))
            pairs.append(replace(pair, clips=tuple(clips)))
    return pairs


def write_example(output: Path, config: WorldConfig, judge_problem: Callable[[str], str]) -> None:
    """Write example.csv and its clips into a folder that may hold other files."""
    pairs = sample_example(config)
    (output / "videos").mkdir(parents=True, exist_ok=True)
    for clip in (clip for pair in pairs for clip in pair.clips):
        render_clip(output / "videos", clip)
    write_table(output / "example.csv", [training_row(pair, judge_problem(pair.prompt)) for pair in pairs])


def main() -> None:
    options = parse_arguments()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from scored_sequence import judge_problem  # the stage's own, so that data and training use one prompt

    config = WorldConfig(seed=options.seed)
    if options.example:
        return write_example(options.output, config, judge_problem)
    counts = {split: getattr(options, f"{split}_pairs") for split in SPLITS}
    num_pairs = {split: count for split, count in counts.items() if count > 0}
    try:
        manifest = make_world(
            options.output, config, num_pairs=num_pairs, workers=options.workers, judge_problem=judge_problem
        )
    except ValueError as error:
        sys.exit(f"make_toy_world.py: {error}")
    sys.stdout.write(json.dumps(manifest["measured"], indent=2) + "\n")


if __name__ == "__main__":
    main()
