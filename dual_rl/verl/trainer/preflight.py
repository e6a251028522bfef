"""Everything that can be wrong with data, model files and the reward function, looked at before a worker starts."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.data.loading import PairLoader, check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.fingerprint import fingerprint
from verl.model.reward_files import PolicyCheckpoint
from verl.reward.function import RewardFunction, load_reward_function
from verl.trainer.config import Config
from verl.types import PreferencePair
from verl.workers.model_setup import read_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run works on; every video was opened and every prompt fits.

    `model_identity`: what training starts from, by content; see `describe_model`.
    """

    train_pairs: list[PreferencePair]
    val_pairs: list[PreferencePair]
    builder: SequenceBuilder
    loader: PairLoader
    reward_function: RewardFunction
    model_identity: dict[str, object]


def check_inputs(config: Config) -> Inputs:
    """Read and check all of it. Raises ValueError naming file, row and remedy."""
    reward_function = load_reward_function(
        config.worker.reward.reward_function, config.worker.reward.reward_function_kwargs
    )
    checkpoint = read_checkpoint(config, with_weights=False)
    _check_lengths(config, checkpoint.config.text_config.max_position_embeddings)
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    data = config.data
    train_pairs = _read(config, data.train_files, checkpoint, builder, should_filter=data.filter_overlong_prompts)
    val_pairs = _read(config, data.val_files, checkpoint, builder, should_filter=False) if data.val_files else []
    loader = PairLoader(builder, checkpoint.video_budget)
    identity = describe_model(config.worker.actor.model.model_path, checkpoint)
    return Inputs(train_pairs, val_pairs, builder, loader, reward_function, identity)


def describe_model(model_path: str, checkpoint: PolicyCheckpoint) -> dict[str, object]:
    """What a run depends on and its checkpoints do not hold: frozen weights and the reference (by content), how clips
    become frames, and the format prompt. JSON values."""
    return {
        "weights": fingerprint(model_path, checkpoint),
        "frames": asdict(checkpoint.video_budget),
        "format prompt": checkpoint.format_prompt,
    }


def check_same_model(saved: Mapping[str, object] | None, present: Mapping[str, object], *, checkpoint: Path) -> None:
    """Raise ValueError if `checkpoint` was trained from another model, `saved`, than this run; None: unknown."""
    changed = [name for name, value in present.items() if saved is not None and saved.get(name) != value]
    if changed:
        raise ValueError(
            f"{checkpoint} was trained from another model (other {', '.join(changed)}) than this run starts from: set "
            "worker.actor.model.* and data.* back, remove the old run, or choose another trainer.experiment_name"
        )


def _check_lengths(config: Config, max_positions: int) -> None:
    data = config.data
    if data.max_prompt_length + data.max_response_length > max_positions:
        raise ValueError(
            f"data.max_prompt_length={data.max_prompt_length} and data.max_response_length={data.max_response_length} "
            f"exceed together the {max_positions} positions that the model was made for: lower one of them"
        )


def _read(
    config: Config, path: str, checkpoint: PolicyCheckpoint, builder: SequenceBuilder, *, should_filter: bool
) -> list[PreferencePair]:
    return check_pairs(
        read_pairs(path, config.data),
        builder,
        checkpoint.video_budget,
        max_prompt_length=config.data.max_prompt_length,
        should_filter=should_filter,
        source=path,
    )
