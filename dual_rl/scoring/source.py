"""From what a user names to what an engine is made of: folder, checkpoint, budget, scale, engine."""

import dataclasses
import logging
import os
from pathlib import Path

import torch

from scoring.scale import RewardScale, load_scale
from scoring.scoring import MAX_PROMPT_LENGTH, ScoringEngine, ScoringSettings
from verl.data.scored_sequence import forbidden_token_ids, reward_token_id
from verl.data.vision_process import VideoBudget
from verl.model.fingerprint import fingerprint
from verl.model.precision import resolve_precision
from verl.model.reward_files import (
    PolicyCheckpoint,
    find_folder,
    load_base,
    load_checkpoint,
    save_engine_folder,
)

NUM_TOKENS_AFTER_COT = 2
"""`<Reward>`, and one that vLLM writes after it."""

logger = logging.getLogger(__name__)


def find_model(path: str | os.PathLike) -> str:
    """The model's folder within a stage 2 `global_step_N` or `actor`; any other path as it is."""
    for inner in ("actor/huggingface", "huggingface"):
        if (Path(path) / inner).is_dir():
            return str(Path(path) / inner)
    return os.fspath(path)


def read_checkpoint(
    model_ckpt: str | os.PathLike, rm_ckpt: str | os.PathLike | None = None, *, fresh_head_seed: int | None = None
) -> PolicyCheckpoint:
    """Everything of a reward model but its weights; with `fresh_head_seed`, of a base model and an untrained head.

    Raises ValueError saying what is missing and how to come by it.
    """
    if os.path.isabs(model_ckpt) and not os.path.isdir(model_ckpt):
        raise ValueError(f"no model folder at {model_ckpt}")
    if fresh_head_seed is None:
        return load_checkpoint(find_model(model_ckpt), rm_ckpt, with_weights=False)
    if rm_ckpt is not None:
        raise ValueError(f"a fresh head and {rm_ckpt} exclude each other: give one of --fresh_head and --rm_ckpt")
    return load_base(model_ckpt, seed=fresh_head_seed)


def choose_prompt_length(checkpoint: PolicyCheckpoint, settings: ScoringSettings) -> int:
    """Tokens of the longest prompt. Raises ValueError when they and the thought exceed the model's positions."""
    positions = checkpoint.config.text_config.max_position_embeddings
    room = positions - settings.max_new_tokens - NUM_TOKENS_AFTER_COT
    length = settings.max_prompt_length or min(MAX_PROMPT_LENGTH, room)
    if not 0 < length <= room:
        raise ValueError(
            f"max_new_tokens={settings.max_new_tokens} leaves {room} of {positions} positions to the prompt, "
            f"which asks for {settings.max_prompt_length or 'some'}: lower max_new_tokens or max_prompt_length"
        )
    return length


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device named, by default the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_budget(checkpoint: PolicyCheckpoint, settings: ScoringSettings) -> VideoBudget:
    """The model's own video budget with what the settings change."""
    return checkpoint.video_budget.replace(fps=settings.video_fps, max_pixels=settings.max_pixels)


def load_model_scale(
    model_ckpt: str | os.PathLike, checkpoint: PolicyCheckpoint, settings: ScoringSettings
) -> RewardScale:
    """The scale kept with a model; warns when videos are read in another way than it was measured with."""
    path = find_model(model_ckpt)
    scale = load_scale(find_folder(path), weights=fingerprint(path, checkpoint))
    budget = dataclasses.asdict(choose_budget(checkpoint, settings))
    if scale.video != budget:
        logger.warning("the scale was measured with videos read with %s, now it is %s", scale.video, budget)
    return scale


def build_scoring_engine(
    folder: Path,
    checkpoint: PolicyCheckpoint,
    settings: ScoringSettings,
    *,
    max_model_len: int,
    device: torch.device,
) -> ScoringEngine:
    """The engine that `settings.backend` asks for, without weights; `folder` takes its files."""
    if settings.backend == "vllm":
        from scoring.vllm_scorer import VllmScorer as Engine
    else:
        from scoring.hf_scorer import HfScorer as Engine
    save_engine_folder(folder, checkpoint, dtype=resolve_precision(settings.precision, device))
    return Engine(
        folder,
        checkpoint,
        settings,
        forbidden_token_ids=forbidden_token_ids(checkpoint.processor, checkpoint.config.text_config.vocab_size),
        reward_token_id=reward_token_id(checkpoint.processor.tokenizer),
        max_model_len=max_model_len,
        device=device,
    )
