"""Best-of-N selection: ranks the clips that were made for each prompt by their reward.

    python examples/best_of_n.py --model_ckpt CHECKPOINT --clips clips/ --output best.csv

`clips/` has a sub-folder per prompt, with `prompt.txt` and the clips. The CSV has a row per clip: folder, rank (1 is
the best), reward, video and chain of thought. Clips that cannot be scored are listed and have no rank.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from descore.progress import progress
from scoring.options import configure_console
from scoring.reward_model import RewardModel
from scoring.types import FailedVideo, Outcome, ScoringSettings, VideoTask
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
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
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


def rank_clips(folder: Path, outcomes: Sequence[Outcome]) -> Iterator[dict[str, object]]:
    """Rows of the CSV: by sub-folder of `folder`, the best clip first, those without a reward last."""

    def key(outcome: Outcome) -> tuple:
        is_failed = isinstance(outcome, FailedVideo)
        return outcome.name.split("/")[0], is_failed, 0.0 if is_failed else -outcome.reward, outcome.name

    for inner, group in groupby(sorted(outcomes, key=key), key=lambda outcome: outcome.name.split("/")[0]):
        for rank, outcome in enumerate(group, start=1):
            row = {"folder": inner, "video": str(folder / outcome.name)}
            is_failed = isinstance(outcome, FailedVideo)
            yield row if is_failed else {**row, "rank": rank, "reward": outcome.reward, "cot": outcome.cot}


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
    configure_console()
    try:
        tasks = find_tasks(options.clips)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = ScoringSettings(
            backend=options.backend, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        with RewardModel.from_pretrained(options.model_ckpt, settings=settings) as model:
            outcomes = list(progress(model.score_stream(tasks), total=len(tasks), description="score", unit="clip"))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    failures = [outcome for outcome in outcomes if isinstance(outcome, FailedVideo)]
    sys.stderr.writelines(f"failed: {failure.name}: {failure.error}\n" for failure in failures)
    rows = list(rank_clips(options.clips, outcomes))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(options.output, table.getvalue())
    for row in rows:
        if row.get("rank") == 1:
            sys.stdout.write(f"{row['folder']}: {row['video']} ({row['reward']:.4f})\n")
    return 0 if len(failures) < len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
