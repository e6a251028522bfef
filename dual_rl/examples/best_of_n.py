"""Best-of-N selection: ranks the clips that were made for each prompt by their reward.

    python examples/best_of_n.py --model_ckpt CHECKPOINT --clips clips/ --output best.csv

`clips/` has a sub-folder per prompt, with `prompt.txt` and the clips. The CSV has a row per clip: folder, rank (1 is
the best), reward, video and chain of thought. Clips that cannot be scored are listed and have no rank. With
--think_when_unsure only clips within a calibrated margin of the best of their folder think; they are ranked first.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from descore.progress import progress
from scoring.options import add_settings, build_source, configure_console
from scoring.reward_model import RewardModel
from scoring.source import load_calibration, read_checkpoint
from scoring.thinking import ThinkMargin
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


def score_clips(model: RewardModel, tasks: Sequence[VideoTask]) -> dict[str, Outcome]:
    """Outcomes by name."""
    stream = progress(model.score_stream(tasks), total=len(tasks), description="score", unit="clip")
    return {outcome.name: outcome for outcome in stream}


def find_contenders(outcomes: Sequence[Outcome], margin: float) -> set[str]:
    """Names of scored clips within `margin` of the best of their sub-folder, where there are several."""
    groups: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        if not isinstance(outcome, FailedVideo):
            groups.setdefault(outcome.name.split("/")[0], {})[outcome.name] = outcome.reward
    close = [
        {name for name, reward in group.items() if reward >= max(group.values()) - margin} for group in groups.values()
    ]
    return {name for names in close if len(names) > 1 for name in names}


def rank_clips(folder: Path, outcomes: Sequence[Outcome], contenders: Set[str]) -> Iterator[dict[str, object]]:
    """Rows of the CSV: by sub-folder of `folder`, the best clip first, `contenders` before others, failures last."""

    def key(outcome: Outcome) -> tuple:
        is_failed, name = isinstance(outcome, FailedVideo), outcome.name
        return name.split("/")[0], is_failed, name not in contenders, 0.0 if is_failed else -outcome.reward, name

    for inner, group in groupby(sorted(outcomes, key=key), key=lambda outcome: outcome.name.split("/")[0]):
        for rank, outcome in enumerate(group, start=1):
            row = {"folder": inner, "video": str(folder / outcome.name)}
            yield row if isinstance(outcome, FailedVideo) else {**asdict(outcome), **row, "rank": rank}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_ckpt", required=True, help="stage 1 checkpoint-N, stage 2 global_step_N, merged model")
    add("--rm_ckpt", help="rm_head.pth; default: the one beside the model")
    add("--clips", type=Path, required=True)
    add("--output", type=Path, required=True, help="CSV to write")
    add("--think_when_unsure", action="store_true", help="by the margin that inference.py --think_agreement kept")
    add_settings(parser, ScoringSettings)
    options = parser.parse_args(argv)
    configure_console()
    try:
        tasks, source = find_tasks(options.clips), build_source(options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        outcomes, rule, contenders = {}, None, {task.name for task in tasks}
        if options.think_when_unsure:
            if options.mask_cot:
                raise ValueError("--think_when_unsure needs thoughts. Leave out --mask_cot.")
            checkpoint = read_checkpoint(options.model_ckpt, options.rm_ckpt)
            rule = load_calibration(ThinkMargin, options.model_ckpt, checkpoint, source.settings)
        with source.load() as model:
            if rule is not None:
                outcomes = score_clips(model, [replace(task, num_thoughts=0) for task in tasks])
                contenders = find_contenders(list(outcomes.values()), rule.margin)
            outcomes |= score_clips(model, [task for task in tasks if task.name in contenders])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if rule is not None:
        sys.stdout.write(f"{len(contenders)} of {len(tasks)} clips thought\n")
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, FailedVideo)]
    sys.stderr.writelines(f"failed: {failure.name}: {failure.error}\n" for failure in failures)
    rows = list(rank_clips(options.clips, list(outcomes.values()), contenders))
    table = io.StringIO(newline="")
    columns = (*COLUMNS, "standard_error") if options.num_thoughts > 1 else COLUMNS
    writer = csv.DictWriter(table, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(options.output, table.getvalue())
    for row in rows:
        if row.get("rank") == 1:
            sys.stdout.write(f"{row['folder']}: {row['video']} ({row['reward']:.4f})\n")
    return 0 if len(failures) < len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
