"""Best-of-N selection: ranks the clips that were made for each prompt by their reward.

    python examples/best_of_n.py --model_ckpt CHECKPOINT --clips clips/ --output best.csv

`clips/` has a sub-folder per prompt, with `prompt.txt` and the clips. The CSV has a row per clip: folder, rank (1 is
the best), reward, video and chain of thought. Clips that cannot be scored are listed and have no rank.
"""

import argparse
import csv
import io
import logging
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from descore.progress import progress
from scoring.reward_model import RewardModel
from scoring.types import FailedVideo, Outcome, ScoredVideo, ScoringSettings, VideoTask
from verl.data.scored_sequence import judge_problem
from verl.trainer.checkpoints import write_atomically

COLUMNS = ("folder", "rank", "reward", "video", "cot")
CLIP_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
PROMPT_FILE = "prompt.txt"


def find_tasks(folder: Path) -> list[VideoTask]:
    """A task per clip, named `sub-folder/clip`, in order of the names.

    Raises ValueError that lists every sub-folder without prompt or clip.
    """
    tasks, problems = [], []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        prompt = inner / PROMPT_FILE
        text = prompt.read_text(encoding="utf-8").strip() if prompt.is_file() else ""
        clips = sorted(path for path in inner.iterdir() if path.suffix.lower() in CLIP_SUFFIXES)
        if not text:
            problems.append(f"{inner} has no text in {PROMPT_FILE}")
        if not clips:
            problems.append(f"{inner} has no clip ({', '.join(CLIP_SUFFIXES)})")
        tasks += [VideoTask(f"{inner.name}/{clip.name}", str(clip), judge_problem(text)) for clip in clips]
    if not tasks and not problems:
        problems.append(f"{folder} has no sub-folder; make one per prompt, with its clips and {PROMPT_FILE}")
    if problems:
        raise ValueError("\n".join(problems))
    return tasks


def rank_clips(folder: Path, outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """Rows of the CSV: by sub-folder of `folder`, the best clip first, those without a reward last."""
    rows = []
    for inner, group in groupby(sorted(outcomes, key=_rank_key), key=lambda outcome: outcome.name.split("/")[0]):
        for rank, outcome in enumerate(group, start=1):
            row = {"folder": inner, "video": str(folder / outcome.name)}
            if isinstance(outcome, ScoredVideo):
                row |= {"rank": rank, "reward": outcome.reward, "cot": outcome.cot}
            rows.append(row)
    return rows


def _rank_key(outcome: Outcome) -> tuple:
    inner, clip = outcome.name.split("/")
    is_failed = isinstance(outcome, FailedVideo)
    return inner, is_failed, 0.0 if is_failed else -outcome.reward, clip


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Complete or absent."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, ScoringSettings()
    add("--model_ckpt", required=True, help="stage 1 checkpoint-N, stage 2 global_step_N, merged model")
    add("--clips", type=Path, required=True)
    add("--output", type=Path, required=True, help="CSV to write")
    add("--backend", choices=["vllm", "hf"], default=default.backend)
    add("--batch_size", type=int, default=default.batch_size)
    add("--max_new_tokens", type=int, default=default.max_new_tokens)
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tasks = find_tasks(options.clips)
        settings = ScoringSettings(
            backend=options.backend, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        with RewardModel.from_pretrained(options.model_ckpt, settings=settings) as model:
            stream = progress(model.score_stream(tasks), total=len(tasks), description="score", unit="clip")
            outcomes = list(stream)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    failures = [outcome for outcome in outcomes if isinstance(outcome, FailedVideo)]
    sys.stderr.writelines(f"failed: {failure.name}: {failure.error}\n" for failure in failures)
    rows = rank_clips(options.clips, outcomes)
    write_rows(options.output, rows)
    for row in rows:
        if row.get("rank") == 1:
            sys.stdout.write(f"{row['folder']}: {row['video']} ({row['reward']:.4f})\n")
    return 0 if len(failures) < len(outcomes) else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    sys.exit(main(sys.argv[1:]))
