"""What is checked and settled before a model is loaded: video budget, format prompt, CSVs, videos, lengths."""

import json
import os
from pathlib import Path

from arguments import DataArguments, ModelArguments, TrainingArguments
from checkpoint import RewardConfig, choose_format_prompt, choose_video_budget
from data import PairDataset
from descore.csv_table import row_of
from losses import AGREEMENT_LOSSES, SCORE_LOSSES
from preference_csv import CsvNeeds, read_pairs, require_clean, scan_sequences, scan_videos
from scored_sequence import SequenceBuilder
from utils import exchange, get_rank, get_world_size
from vision_process import VideoBudget


def build_config(model: ModelArguments, data: DataArguments) -> RewardConfig:
    """What travels with the checkpoint.

    The base model's own video budget and format prompt hold; flags override them, with a warning.
    """
    base = model.model_name_or_path
    budget = choose_video_budget(
        base,
        fps=data.fps,
        min_frames=data.min_frames,
        min_pixels=data.min_frame_pixels,
        max_pixels=data.max_frame_pixels,
    )
    format_prompt = Path(data.format_prompt).read_text() if data.format_prompt else None
    return RewardConfig(
        base_model=os.path.abspath(base) if os.path.isdir(base) else base,
        reward_token=model.reward_token,
        video=budget,
        format_prompt=choose_format_prompt(base, format_prompt),
    )


def load_checked_data(
    path: str, builder: SequenceBuilder, budget: VideoBudget, *, data: DataArguments, training: TrainingArguments
) -> PairDataset:
    """Read a CSV and check rows, videos and lengths; each rank opens the videos of its share of the rows.

    Raises CsvError that lists the faults of all rows, on every rank.
    """
    needs = CsvNeeds(
        eval_dim=data.eval_dim,
        scores=training.loss_type in SCORE_LOSSES,
        agreeing_scores=training.loss_type in AGREEMENT_LOSSES,
        cots=data.mask_probability < 1.0,
    )
    pairs = read_pairs(path, needs)
    rank, num_ranks = get_rank(), get_world_size()
    mine, is_quiet = pairs[rank::num_ranks], rank != 0
    headers, problems = scan_videos(mine, budget, is_quiet=is_quiet)
    problems += scan_sequences(mine, headers, builder, budget, max_length=data.max_length, is_quiet=is_quiet)
    of_all_ranks = [problem for answer in exchange(json.dumps(problems)) for problem in json.loads(answer)]
    require_clean(path, sorted(of_all_ranks, key=row_of))
    return PairDataset(pairs, builder, budget)
