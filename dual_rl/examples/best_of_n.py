"""Best-of-N selection: ranks the clips that were made for each prompt by their reward.

    python examples/best_of_n.py --model_ckpt CHECKPOINT --clips clips/ --output best.csv

`clips/` has a sub-folder for each prompt, with `prompt.txt` and the clips. The CSV has a row for each clip: folder,
rank (1 is the best), reward, video and chain of thought. Clips that cannot be scored are listed and have no rank.
"""

import argparse
import csv
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scoring.best_of_n import Candidates, build_tasks, find_candidates
from scoring.reward_model import RewardModel
from scoring.scoring import Outcome, ScoredVideo, ScoringSettings
from verl.data.scored_sequence import judge_problem

COLUMNS = ("folder", "rank", "reward", "video", "cot")


def rank_clips(candidates: Sequence[Candidates], outcomes: Mapping[str, Outcome]) -> list[dict[str, object]]:
    """Rows of the CSV, the best clip of each prompt first, those without a reward last."""
    rows = []
    for group in candidates:
        clips = [(clip, outcomes[f"{group.name}/{clip.name}"]) for clip in group.clips]
        scored = [(clip, outcome) for clip, outcome in clips if isinstance(outcome, ScoredVideo)]
        scored.sort(key=lambda both: -both[1].reward)
        for rank, (clip, outcome) in enumerate(scored, start=1):
            rows.append(dict(zip(COLUMNS, (group.name, rank, outcome.reward, str(clip), outcome.cot), strict=True)))
        rows += [
            {"folder": group.name, "video": str(clip)}
            for clip, outcome in clips
            if not isinstance(outcome, ScoredVideo)
        ]
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_ckpt", required=True, help="stage 1 checkpoint-N, stage 2 global_step_N, merged model"
    )
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    parser.add_argument("--backend", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--batch_size", type=int, default=ScoringSettings.batch_size)
    parser.add_argument("--max_new_tokens", type=int, default=ScoringSettings.max_new_tokens)
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        candidates = find_candidates(options.clips)
        tasks = build_tasks(candidates, [judge_problem(group.prompt) for group in candidates])
        settings = ScoringSettings(
            backend=options.backend, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        with RewardModel.from_pretrained(options.model_ckpt, settings=settings) as model:
            stream = tqdm(model.score_stream(tasks), total=len(tasks), unit="clip", disable=not sys.stderr.isatty())
            outcomes = {outcome.name: outcome for outcome in stream}
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    failures = [outcome for outcome in outcomes.values() if not isinstance(outcome, ScoredVideo)]
    sys.stderr.writelines(f"failed: {outcome.name}: {outcome.error}\n" for outcome in failures)
    rows = rank_clips(candidates, outcomes)
    write_rows(options.output, rows)
    for row in rows:
        if row.get("rank") == 1:
            sys.stdout.write(f"{row['folder']}: {row['video']} ({row['reward']:.4f})\n")
    return 0 if len(failures) < len(outcomes) else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    sys.exit(main(sys.argv[1:]))
