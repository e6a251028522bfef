"""Everything that a run works on, checked before a worker starts, and what makes a run the same run.

A checkpoint does not hold everything that a run depends on: frozen weights and the reference (known by content), the
data and its order, how clips become frames, the format prompt, and which weights train. These make up the identity of
a run, which is written into every checkpoint and compared before a run continues.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config import Config
from verl.config_loading import CONFIG_FILE, get_setting
from verl.data.loading import PairLoader, check_pairs
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.reward_files import PolicyCheckpoint, fingerprint
from verl.reward.function import RewardFunction, load_reward_function
from verl.types import PreferencePair
from verl.workers.model_setup import read_checkpoint

ORDER_SETTINGS = {"batch_size": "data.rollout_batch_size", "shuffle": "data.shuffle", "seed": "data.seed"}
MODEL_SETTINGS = tuple(
    f"worker.actor.model.{name}" for name in ("lora.rank", "lora.alpha", "freeze_vision_tower", "trainable_head")
)

Identity = dict[str, object]


@dataclass(frozen=True)
class Inputs:
    """What a run works on. Every video was opened, and every prompt fits.

    `val` is None without held-out pairs. `identity`: see `describe_run`.
    """

    train: PairLoader
    val: PairLoader | None
    builder: SequenceBuilder
    reward_function: RewardFunction
    identity: Identity


def check_inputs(config: Config) -> Inputs:
    """Read and check data, model files and the reward function. Raises ValueError naming file, row and remedy."""
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
    budget = checkpoint.video_budget

    def read(path: str, *, should_filter: bool) -> PairLoader:
        limits = {"max_prompt_length": data.max_prompt_length, "should_filter": should_filter}
        pairs = check_pairs(read_pairs(path, data), builder, budget, source=path, **limits)
        return PairLoader(pairs, builder, budget, source=path, max_dropped_share=data.max_dropped_share)

    train = read(data.train_files, should_filter=data.filter_overlong_prompts)
    val = read(data.val_files, should_filter=False) if data.val_files else None
    return Inputs(train, val, builder, reward_function, describe_run(config, checkpoint, train.pairs))


def describe_run(config: Config, checkpoint: PolicyCheckpoint, train_pairs: Sequence[PreferencePair]) -> Identity:
    """What a continued run must share, as JSON values by name. `checkpoint`: what training starts from."""
    settings = {key: get_setting(config, key) for key in (*ORDER_SETTINGS.values(), *MODEL_SETTINGS)}
    digest = hashlib.sha256()
    for pair in train_pairs:  # without the paths: videos may be moved between two runs
        digest.update(repr((pair.pair_id, pair.problem, pair.answer)).encode())
    return settings | {
        "training data": digest.hexdigest()[:16],
        "weights": fingerprint(config.worker.actor.model.model_path, checkpoint),
        "frames": asdict(checkpoint.video_budget),
        "format prompt": checkpoint.format_prompt,
    }


def read_identity(checkpoint: Path, state: Mapping[str, Any]) -> Identity:
    """The identity of a checkpoint. Older checkpoints have its parts in `stream`, `model` and the saved settings."""
    if "identity" in state:
        return state["identity"]
    stream, saved = state["stream"], OmegaConf.load(checkpoint / CONFIG_FILE)
    return {
        **{key: stream[name] for name, key in ORDER_SETTINGS.items()},
        **{key: OmegaConf.select(saved, key) for key in MODEL_SETTINGS},
        "training data": stream["fingerprint"],
        **state.get("model", {}),
    }


def require_same_run(saved: Identity, present: Identity, *, checkpoint: Path) -> None:
    """Raise ValueError that names what differs between the run of `checkpoint` and this one."""
    changed = [
        f"{name} was {saved[name]} and is {value}" if "." in name else f"other {name}"
        for name, value in present.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(changed)}. Set worker.actor.model.* and data.* back, or "
            "start a new run with another trainer.experiment_name."
        )
