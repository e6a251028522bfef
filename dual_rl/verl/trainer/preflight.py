"""Checks data, model files and the reward function before a worker starts."""

from dataclasses import dataclass

from verl.config import Config
from verl.data.loading import PairLoader, check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.reward_files import PolicyCheckpoint
from verl.reward.function import RewardFunction, load_reward_function
from verl.trainer.identity import Identity, describe_run
from verl.types import PreferencePair
from verl.workers.model_setup import read_checkpoint


@dataclass(frozen=True)
class PairSet:
    """The pairs of a CSV and what loads them. Every video was opened, and every prompt fits."""

    pairs: list[PreferencePair]
    loader: PairLoader


@dataclass(frozen=True)
class Inputs:
    """What a run works on; `val` is None without held-out pairs. `identity`: see `describe_run`."""

    train: PairSet
    val: PairSet | None
    builder: SequenceBuilder
    reward_function: RewardFunction
    identity: Identity


def check_inputs(config: Config) -> Inputs:
    """Read and check all of it. Raises ValueError naming file, row and remedy."""
    data, reward = config.data, config.worker.reward
    reward_function = load_reward_function(reward.reward_function, reward.reward_function_kwargs)
    checkpoint = read_checkpoint(config, with_weights=False)
    max_positions = checkpoint.config.text_config.max_position_embeddings
    if data.max_prompt_length + data.max_response_length > max_positions:
        raise ValueError(
            f"data.max_prompt_length={data.max_prompt_length} and data.max_response_length={data.max_response_length} "
            f"together exceed the model's {max_positions} positions. Lower one of them."
        )
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    train = _read(config, data.train_files, checkpoint, builder, should_filter=data.filter_overlong_prompts)
    val = _read(config, data.val_files, checkpoint, builder, should_filter=False) if data.val_files else None
    return Inputs(train, val, builder, reward_function, describe_run(config, checkpoint, train.pairs))


def _read(
    config: Config, path: str, checkpoint: PolicyCheckpoint, builder: SequenceBuilder, *, should_filter: bool
) -> PairSet:
    data, budget = config.data, checkpoint.video_budget
    pairs = check_pairs(
        read_pairs(path, data),
        builder,
        budget,
        max_prompt_length=data.max_prompt_length,
        should_filter=should_filter,
        source=path,
    )
    loader = PairLoader(builder, budget, source=path, num_pairs=len(pairs), max_dropped_share=data.max_dropped_share)
    return PairSet(pairs, loader)
