"""What is checked and settled before a model is loaded: output folder, video budget, CSVs, videos, lengths."""

import json
import logging
import os
import shutil
from pathlib import Path

from arguments import DataArguments, ModelArguments, TrainingArguments
from checkpoint import STATE_FILE, RewardConfig, choose_format_prompt, stored_video_budget
from descore.csv_table import row_of
from descore.run_lock import lock_folder
from preference_csv import (
    CsvNeeds,
    PreferencePair,
    read_pairs,
    require_clean,
    scan_sequences,
    scan_videos,
)
from scored_sequence import SequenceBuilder
from trainer_qwen3 import TEMPORARY_PREFIX, list_checkpoints
from utils import exchange, get_rank, get_world_size, run_on_main_process
from vision_process import VideoBudget

logger = logging.getLogger(__name__)

LATEST = "latest"


def take_over(output_dir: str) -> None:
    """Lock the output folder for this run, and remove what a killed one left. Raises ValueError if it is in use."""

    def lock_and_clean() -> None:
        lock_folder(output_dir)
        for unfinished in Path(output_dir).glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(unfinished)

    run_on_main_process(lock_and_clean)


def find_resume(arguments: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises ValueError rather than mix two runs in one folder: for a fresh start where there are checkpoints, and for
    one from another checkpoint than the folder's last.
    """
    output_dir = Path(arguments.output_dir)
    existing = list_checkpoints(output_dir)
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        if existing:
            raise ValueError(
                f"{output_dir} already holds {existing[-1].name}: continue it with --resume_from_checkpoint {LATEST}, "
                "or choose another --output_dir"
            )
        return None
    if wanted == LATEST:
        if not existing:
            logger.info("no checkpoint in %s yet: starting from the beginning", output_dir)
        return existing[-1] if existing else None
    if not (Path(wanted) / STATE_FILE).is_file():
        raise ValueError(f"--resume_from_checkpoint {wanted} is not a checkpoint-N folder with {STATE_FILE} in it")
    _require_last(Path(wanted), existing, output_dir)
    return Path(wanted)


def _require_last(wanted: Path, existing: list[Path], output_dir: Path) -> None:
    """Raise ValueError when the folder holds checkpoints that come after `wanted`, or are of another run."""
    places = [path.resolve() for path in existing]
    others = existing
    if wanted.resolve() in places:
        others = existing[places.index(wanted.resolve()) + 1 :]
    if others:
        names = ", ".join(path.name for path in others)
        raise ValueError(
            f"{output_dir} already holds {names}, which --resume_from_checkpoint {wanted} would mix with another run: "
            f"remove {names}, or choose another --output_dir (OUTPUT_DIR)"
        )


def build_config(model: ModelArguments, data: DataArguments) -> RewardConfig:
    """What travels with the checkpoint.

    The base's own video budget and format prompt hold; flags override them, with a warning.
    """
    base = model.model_name_or_path
    stored = stored_video_budget(base)
    budget = (stored or VideoBudget()).replace(
        fps=data.fps,
        min_frames=data.min_frames,
        min_pixels=data.min_frame_pixels,
        max_pixels=data.max_frame_pixels,
    )
    if stored is not None and budget != stored:
        logger.warning("flags override the video budget of %s: %s becomes %s", base, stored, budget)
    format_prompt = Path(data.format_prompt).read_text() if data.format_prompt else None
    return RewardConfig(
        base_model=os.path.abspath(base) if os.path.isdir(base) else base,
        reward_token=model.reward_token,
        video=budget,
        format_prompt=choose_format_prompt(base, format_prompt),
    )


def load_checked_pairs(
    path: str, builder: SequenceBuilder, budget: VideoBudget, *, data: DataArguments, training: TrainingArguments
) -> list[PreferencePair]:
    """Read a CSV and check rows, videos and lengths; each rank opens the videos of its share of the rows.

    Raises CsvError that lists the faults of all rows, on every rank.
    """
    needs = CsvNeeds(
        eval_dim=data.eval_dim,
        scores=training.needs_scores,
        agreeing_scores=training.needs_agreeing_scores,
        cots=data.mask_probability < 1.0,
    )
    pairs = read_pairs(path, needs)
    rank, num_ranks = get_rank(), get_world_size()
    mine, is_quiet = pairs[rank::num_ranks], rank != 0
    headers, problems = scan_videos(mine, budget, is_quiet=is_quiet)
    problems += scan_sequences(mine, headers, builder, budget, max_length=data.max_length, is_quiet=is_quiet)
    everyones = [problem for answer in exchange(json.dumps(problems)) for problem in json.loads(answer)]
    require_clean(path, sorted(everyones, key=row_of))
    return pairs
