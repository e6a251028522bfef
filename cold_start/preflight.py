"""What is checked and settled before a model is loaded: output folder, video budget, CSVs, videos, lengths."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from arguments import DataArguments, ModelArguments, TrainingArguments
from checkpoint import RewardConfig, choose_format_prompt, stored_video_budget
from preference_csv import CsvNeeds, PreferencePair, read_pairs, require_clean, scan_sequences, scan_videos
from scored_sequence import SequenceBuilder
from trainer_qwen3 import TEMPORARY_PREFIX, list_checkpoints
from utils import is_main_process
from vision_process import VideoBudget

logger = logging.getLogger(__name__)

LATEST = "latest"


def prepare_output(arguments: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises ValueError rather than mix two runs in one folder: for a fresh start where there are checkpoints, and for
    one from another checkpoint than the folder's last.
    """
    output_dir = Path(arguments.output_dir)
    existing = list_checkpoints(output_dir)
    if is_main_process():
        for unfinished in output_dir.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(unfinished)
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
    if not Path(wanted).is_dir():
        raise ValueError(f"--resume_from_checkpoint {wanted}: no such folder")
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
    """Read a CSV and check rows, videos and lengths; the costly checks run on the main process only."""
    needs = CsvNeeds(
        eval_dim=data.eval_dim,
        scores=training.needs_scores,
        agreeing_scores=training.needs_agreeing_scores,
        cots=data.mask_probability < 1.0,
    )
    pairs = read_pairs(path, needs)

    def check() -> None:
        headers, problems = scan_videos(pairs, budget)
        problems += scan_sequences(pairs, headers, builder, budget, max_length=data.max_length)
        require_clean(path, problems)

    _run_on_main_process(check)
    return pairs


def _run_on_main_process(check: Callable[[], None]) -> None:
    """Run `check` on rank 0; its ValueError is raised on every rank."""
    message = [""]
    if is_main_process():
        try:
            check()
        except ValueError as error:
            message = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise ValueError(message[0])
