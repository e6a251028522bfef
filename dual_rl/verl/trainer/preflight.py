"""Everything that can be wrong with data, model files and the reward function, looked at before a worker starts."""

import logging
from dataclasses import dataclass

from verl.data.loading import PairLoader, check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.reward_files import PolicyCheckpoint
from verl.reward.function import RewardFunction, load_reward_function
from verl.trainer.config import Config
from verl.types import PreferencePair
from verl.workers.model_setup import read_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run works on; every video was opened and every prompt fits."""

    train_pairs: list[PreferencePair]
    val_pairs: list[PreferencePair]
    builder: SequenceBuilder
    loader: PairLoader
    reward_function: RewardFunction


def check_inputs(config: Config) -> Inputs:
    """Read and check all of it. Raises ValueError naming file, row and remedy."""
    reward_function = load_reward_function(
        config.worker.reward.reward_function, config.worker.reward.reward_function_kwargs
    )
    checkpoint = read_checkpoint(config, with_weights=False)
    _check_lengths(config, checkpoint.config.text_config.max_position_embeddings)
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    train_pairs = _read(config, config.data.train_files, checkpoint, builder)
    val_pairs = _read(config, config.data.val_files, checkpoint, builder) if config.data.val_files else []
    loader = PairLoader(builder, checkpoint.video_budget)
    return Inputs(train_pairs, val_pairs, builder, loader, reward_function)


def _check_lengths(config: Config, max_positions: int) -> None:
    data = config.data
    if data.max_prompt_length + data.max_response_length > max_positions:
        raise ValueError(
            f"data.max_prompt_length={data.max_prompt_length} and data.max_response_length={data.max_response_length} "
            f"exceed together the {max_positions} positions that the model was made for: lower one of them"
        )


def _read(config: Config, path: str, checkpoint: PolicyCheckpoint, builder: SequenceBuilder) -> list[PreferencePair]:
    data = config.data
    return check_pairs(
        read_pairs(path, data),
        builder,
        checkpoint.video_budget,
        max_prompt_length=data.max_prompt_length,
        should_filter=data.filter_overlong_prompts,
        source=path,
    )
